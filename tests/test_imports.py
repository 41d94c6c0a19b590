"""Which file imports which: downwards only, and never in a circle. An import for types alone counts like any other."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Rooms of vllm_sparse from the bottom up; those of one line may import one another.
ROOMS = (
    (
        "pages",
        "keys",
        "host_copy",
        "shared_directory",
        "server_process",
        "step.roles",
        "step.launch",
        "step.rows",
        "step.chunks",
    ),
    ("kernels",),
    ("methods",),
    ("config",),
    ("step",),
    ("metrics",),
    ("backend",),
    ("hooks", "server"),
    ("plugin", "inspect", "calibration", "quality", "command"),
)

Imports = dict[str, set[str]]


@functools.cache
def imports_of(package: str) -> Imports:
    """Each file of a package, by its module's name, with the files of that package that it imports."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: Imports = {}
    for name, path in modules.items():
        named: list[str] = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}, line {node.lineno}: import by the full name, not relative to the file"
                # A name is a file's own, or stands in the file that it is imported from.
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                named += [whole if whole in modules else str(node.module) for whole in inner]
        found[name] = {other for other in named if other in modules} - {name}
    return found


def circles(imports: Imports) -> set[frozenset[str]]:
    """Sets of modules of which each imports each, directly or through others."""
    reached: Imports = {}
    for start in imports:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            fresh = imports[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        reached[start] = seen
    return {
        frozenset(other for other in seen if start in reached[other])
        for start, seen in reached.items()
        if start in seen
    }


def between_neighbours(imports: Imports, folder: str) -> Imports:
    """Imports between the files and folders of a folder, each folder taken as a whole."""

    def place(module: str) -> str | None:
        inside = module.startswith(f"{folder}.")
        return ".".join(module.split(".")[: folder.count(".") + 2]) if inside else None

    found: Imports = {}
    for module, others in imports.items():
        here = place(module)
        if here is not None:
            found.setdefault(here, set()).update({there for other in others if (there := place(other))} - {here})
    return found


def floor_of(module: str) -> int:
    """How far up in `ROOMS` a module of vllm_sparse lives; the package's own ``__init__`` is below all."""
    inner = module.removeprefix("vllm_sparse").removeprefix(".")
    if not inner:
        return -1
    floors = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
    room = inner if inner in floors else inner.partition(".")[0]
    assert room in floors, f"vllm_sparse.{room}: say in ROOMS where it belongs"
    return floors[room]


def folders_of(modules: Iterable[str]) -> set[str]:
    """Folders that hold any of the modules."""
    return {module.rpartition(".")[0] for module in modules} - {""}


def test_a_circle_is_found_and_what_leads_to_it_is_no_part_of_it() -> None:
    imports: Imports = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(imports) == {frozenset({"b", "c"})}


def test_a_circle_of_folders_is_found_where_no_file_is_in_a_circle() -> None:
    imports: Imports = {"p.a.x": {"p.b.y"}, "p.b.y": set(), "p.b.z": {"p.a.v"}, "p.a.v": set()}
    assert circles(imports) == set()
    assert circles(between_neighbours(imports, "p")) == {frozenset({"p.a", "p.b"})}


@pytest.mark.parametrize("package", ["vllm_sparse", "loadtest"])
def test_no_files_import_one_another_in_a_circle(package: str) -> None:
    assert circles(imports_of(package)) == set()


def test_no_folders_of_the_load_test_import_one_another_in_a_circle() -> None:
    imports = imports_of("loadtest")
    for folder in folders_of(imports):
        assert circles(between_neighbours(imports, folder)) == set(), folder


def test_rooms_import_only_what_is_below_them() -> None:
    upward = {
        (module, other)
        for module, others in imports_of("vllm_sparse").items()
        for other in others
        if floor_of(other) > floor_of(module)
    }
    assert upward == set()
