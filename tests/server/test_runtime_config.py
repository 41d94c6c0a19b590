"""Changes of the configuration while a server runs, beyond what the served tests see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_sparse.config.names import METHODS
from vllm_sparse.config.presets import PRESETS, Choice, Preset, Tier
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.server import runtime_config
from vllm_sparse.server.runtime_config import (
    DIRECTORY_VARIABLE,
    FixedSettingError,
    OutdatedError,
    RunningConfig,
    Served,
    change_config,
    running_config,
)

LAYERS, HEADS, CONTEXT_TOKENS = 32, 32, 131072


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory that API servers share."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    yield tmp_path
    runtime_config._parse.cache_clear()


def served(decode_graphs: bool = False, **settings: Any) -> Served:
    return Served(
        parse_server_config({"sparse": settings}, LAYERS, HEADS), LAYERS, HEADS, CONTEXT_TOKENS, decode_graphs
    )


def test_without_a_directory_the_start_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    start = ServerConfig(prefill="sale")
    assert running_config(start) == RunningConfig(1, start)


def test_the_directory_is_made_only_where_the_routes_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And removed when the process that made it ends."""
    code = (
        "import os; from vllm_sparse.server.runtime_config import announce_directory, DIRECTORY_VARIABLE;"
        "announce_directory(); announce_directory(); print(os.environ.get(DIRECTORY_VARIABLE))"
    )
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    found = {}
    for plugins in (None, "other", "sparse,other"):
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
        environment |= {} if plugins is None else {"VLLM_PLUGINS": plugins}
        ended = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        found[plugins] = ended.stdout.splitlines()[-1]
    assert found[None] == found["other"] == "None"
    made = Path(found["sparse,other"])
    assert made.name.startswith("vllm-sparse-config-")
    assert not made.exists()


def test_a_change_is_over_the_command_line_not_over_the_last_change(directory: Path) -> None:
    server = served(prefill="flexprefill", flexprefill={"gamma": 0.8, "min_budget_tokens": 256})
    _, first = change_config(server, {"min_tokens": 5, "flexprefill": {"gamma": 0.5}}, None)
    assert (first.config.min_tokens, first.config.knobs("flexprefill")) == (5, {"gamma": 0.5, "min_budget_tokens": 256})
    old, second = change_config(server, {"decode": "tidal"}, first.etag)
    assert old == first
    assert second == RunningConfig(3, server.start.model_copy(update={"decode": "tidal"}))
    assert running_config(server.start) == second


def test_a_change_that_fails_half_way_changes_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = served()
    _, before = change_config(server, {"min_tokens": 5}, None)

    def fail(self: Path, target: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        change_config(server, {"min_tokens": 6}, None)
    monkeypatch.undo()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(directory))
    assert running_config(server.start) == before
    assert change_config(server, {"min_tokens": 7}, None)[1].version == before.version + 1


def test_a_writer_that_dies_holds_up_no_other(directory: Path) -> None:
    code = (
        "import fcntl, os, sys; lock = open(os.path.join(sys.argv[1], 'lock'), 'w');"
        "fcntl.flock(lock, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(directory)], check=False)
    assert change_config(served(), {"min_tokens": 6}, None)[1].version == 2


def test_tags_tell_versions_and_restarts_apart(directory: Path) -> None:
    server = served()
    start = running_config(server.start)
    assert start.etag != RunningConfig(1, ServerConfig(prefill="sale")).etag
    change_config(server, {"min_tokens": 1}, f'"other", {start.etag}')
    back = change_config(server, {}, "*")[1]
    assert (back.config, back.etag != start.etag) == (start.config, True)
    with pytest.raises(OutdatedError, match=start.etag):
        change_config(server, {"min_tokens": 2}, start.etag)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tidal": {"list_per": "query_head"}}, "object sparse.tidal: .*do not serve these knobs"),
        (
            {"hip": {"stage_budget_tokens": [65536, 8192, 2048]}},
            "object sparse.hip: .*graphs and their memory do not serve",
        ),
        ({"tidal": {"budget_tokens": 8192}}, "lists of 8192 tokens are longer than decode_list_tokens, 4352"),
    ],
)
def test_defaults_that_no_graph_holds_are_refused(directory: Path, settings: Any, message: str) -> None:
    """With graphs; a server without them takes the change."""
    methods = ["tidal", "blocktopk", "hip"]
    with pytest.raises(FixedSettingError, match=message):
        change_config(served(decode_graphs=True, methods=methods), settings, None)
    assert change_config(served(methods=methods), settings, None)[1].version == 2


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset of the tests' own, which needs a method that is not enabled by default."""
    tier = Tier(1000, Choice("sale"), Choice("blocktopk", {"budget_tokens": 4096}))
    monkeypatch.setitem(PRESETS, "stepped", Preset("for tests", "not measured", (tier,)))


def test_the_preset_can_change(directory: Path, stepped: None) -> None:
    """Over the command line's methods, which win unless the change takes them back."""
    server = served(prefill="flexprefill", methods=METHODS)
    _, now = change_config(server, {"preset": "stepped"}, None)
    assert (now.config.preset, now.config.prefill, now.config.decode) == ("stepped", "flexprefill", None)
    _, now = change_config(server, {"preset": "stepped", "prefill": None}, None)
    assert running_config(server.start).config.default_method("prefill") is None
    _, now = change_config(server, {}, None)
    assert now.config == server.start


def test_a_preset_enables_no_method_while_the_server_runs(directory: Path, stepped: None) -> None:
    with pytest.raises(
        ValueError, match="sparse_preset is 'stepped', whose decode method blocktopk this server does not"
    ):
        change_config(served(), {"preset": "stepped"}, None)
    enabled = served(preset="stepped")
    assert change_config(enabled, {"preset": "dense"}, None)[1].config.methods == enabled.start.methods
    assert change_config(enabled, {"preset": "stepped"}, None)[1].config == enabled.start


def test_a_preset_that_no_graph_holds_is_refused(directory: Path, stepped: None) -> None:
    settings: dict[str, Any] = {"methods": METHODS, "decode_list_tokens": 2048, "blocktopk": {"budget_tokens": 1024}}
    with pytest.raises(FixedSettingError, match=r"sparse\.preset stepped: lists of 4096 tokens are longer than"):
        change_config(served(decode_graphs=True, **settings), {"preset": "stepped"}, None)
    assert change_config(served(**settings), {"preset": "stepped"}, None)[1].version == 2


def test_defaults_that_graphs_hold_are_taken(directory: Path) -> None:
    server = served(decode_graphs=True, methods=["tidal", "blocktopk", "hip", "sale"])
    settings = {
        "unprofitable": "sparse",
        "tidal": {"budget_tokens": 4096, "sink_tokens": 0, "dense_layers": 4, "selection_reads": "list"},
        "hip": {"sink_tokens": 64},
        "sale": {"tau": 0.1},
        "blocktopk": {"dense_layers": 0},
        "min_recall": 0.9,
    }
    assert change_config(server, settings, None)[1].version == 2
    # Lists of this server were too long from the start.
    long = served(decode_graphs=True, tidal={"budget_tokens": 9000})
    assert change_config(long, {"tidal": {"budget_tokens": 8000}}, None)[1].version == 3


def test_stating_a_default_that_cannot_change_is_no_change(directory: Path) -> None:
    server = served()
    settings = {
        "blocktopk": {"page_tokens": 16, "scores": "bounds"},
        "decode_in_batches": True,
        "tidal": {"policy": ""},
    }
    assert change_config(server, settings, None)[1].version == 2
    with pytest.raises(FixedSettingError, match=r"sparse\.tidal\.policy is 'x'; it is ''"):
        change_config(server, {"tidal": {"policy": "x"}}, None)


def test_a_change_may_use_former_names(directory: Path) -> None:
    """They change the knob that the command line names by its present name, and the checks see it."""
    server = served(tidal={"budget_tokens": 1024})
    _, now = change_config(server, {"tidal": {"budget": 4096}}, None)
    assert now.config.knobs("tidal") == {"budget_tokens": 4096}
    with pytest.raises(FixedSettingError, match=r"sparse\.blocktopk\.page_tokens is 32; it is 16"):
        change_config(server, {"blocktopk": {"block": 32}}, None)
    with pytest.raises(ValueError, match="tidal_budget is the former name of tidal_budget_tokens, which is set too"):
        change_config(server, {"tidal": {"budget": 512, "budget_tokens": 512}}, None)
