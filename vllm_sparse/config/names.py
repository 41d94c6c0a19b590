"""Names of phases, methods and knobs, and the request keys made of them; all from the registry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS

DENSE = "dense"
PHASES: dict[str, Mapping[str, type[PrefillMethod] | type[DecodeMethod]]] = {
    "prefill": PREFILL_METHODS,
    "decode": DECODE_METHODS,
}
# Names of all methods, each once; one name may be a method of both phases.
METHODS = tuple(dict.fromkeys(name for methods in PHASES.values() for name in methods))

REQUEST_KEYS = (
    *("sparse_preset", "sparse_prefill", "sparse_decode"),
    *("sparse_min_tokens", "sparse_min_recall", "sparse_unprofitable"),
)
# What runs where a sparse method would take longer than dense attention.
UNPROFITABLE = ("dense", "sparse")

_OWN_KEY = re.compile(rf"(?i:sparse|(?:{'|'.join(METHODS)})(?-i:(?![a-z])))")


def is_sparse_key(key: str) -> bool:
    """Whether a sampling extra is meant for this plugin.

    Misspelt ones such as ``sparse-decode`` and ``tidalBudget`` are; words that only begin like a method, such as
    ``hipster``, are not.
    """
    return _OWN_KEY.match(key) is not None


def sparse_keys(extras: Iterable[str]) -> list[str]:
    """Those sampling extras that are meant for this plugin."""
    return [key for key in extras if is_sparse_key(key)]


def split_key(key: str) -> tuple[str, str]:
    """Method and knob of a request key ``<method>_<knob>``.

    Both may hold ``_``, so the method is the one with the longest name that the key begins with.

    Returns:
        The names; the method is ``""`` where the key begins with no method's name.
    """
    for name in sorted(METHODS, key=len, reverse=True):
        if key == name or key.startswith(f"{name}_"):
            return name, key[len(name) + 1 :]
    return "", key


def phases_of(name: str) -> list[str]:
    """Phases for which there is a method of this name."""
    return [phase for phase, known in PHASES.items() if name in known]


def phases_with(name: str, knob: str) -> list[str]:
    """Phases whose method of this name has this knob."""
    return [phase for phase in phases_of(name) if knob in knob_schema(phase, name)]


def former_keys(phase: str, name: str) -> dict[str, str]:
    """Present request key of each renamed knob of a phase's method, by its former one."""
    renamed = PHASES[phase][name].former_names
    return {f"{name}_{former}": f"{name}_{present}" for former, present in renamed.items()}


def is_request_knob(phase: str, name: str, knob: str) -> bool:
    """Whether a request may set the knob; else only the server's configuration may."""
    return knob not in PHASES[phase][name].server_knobs


@lru_cache
def knob_schema(phase: str, name: str) -> dict[str, dict[str, Any]]:
    """JSON schema of each knob of a phase's method, its default included."""
    properties: dict[str, dict[str, Any]] = TypeAdapter(PHASES[phase][name]).json_schema()["properties"]
    return properties
