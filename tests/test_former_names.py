"""Former names of knobs: accepted wherever a knob is set, the same setting, logged once, and never beside the new name.

`RENAMED` is written out, so that a former name cannot vanish from a method's file unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_sparse.config import former_names
from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import METHODS, PHASES, knob_schema
from vllm_sparse.config.request import resolve
from vllm_sparse.config.salt import cache_salt
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.config.settings import ServerConfig

LAYERS, HEADS = 32, 32
ALL_ENABLED = ServerConfig(methods=METHODS)

# Of each method: former name, present name, a value that is not the default.
RENAMED: dict[str, list[tuple[str, str, Any]]] = {
    "flexprefill": [
        ("tau", "divergence_threshold", 0.2),
        ("min_budget", "min_budget_tokens", 512),
        ("max_budget", "max_budget_tokens", 4096),
        ("query_block", "query_block_tokens", 64),
        ("rows", "list_per", "kv_head"),
    ],
    "sale": [
        ("sink", "sink_tokens", 64),
        ("local", "recent_tokens", 256),
        ("query_block", "query_block_tokens", 128),
        ("rows", "list_per", "kv_head"),
    ],
    "dhsa": [
        ("budget", "budget_tokens", 4096),
        ("chunks", "key_blocks", "adaptive"),
        ("chunk", "key_block_tokens", 64),
        ("sink", "sink_tokens", 64),
        ("local", "recent_tokens", 64),
        ("dense_tail", "dense_tail_tokens", 0),
        ("heads", "scores_per", "layer"),
        ("query_block", "query_block_tokens", 64),
        ("rows", "list_per", "kv_head"),
    ],
    "hip": [
        ("stage_chunks", "stage_block_tokens", [128, 64, 16]),
        ("stage_tokens", "stage_budget_tokens", [16384, 8192, 1024]),
        ("sink", "sink_tokens", 64),
        ("window", "recent_tokens", 64),
        ("dense_tail", "dense_tail_tokens", 0),
        ("heads", "scores_per", "layer"),
        ("query_block", "query_block_tokens", 64),
        ("rows", "list_per", "query_head"),
        ("refresh", "refresh_steps", [8, 4, 2]),
    ],
    "tidal": [
        ("budget", "budget_tokens", 512),
        ("full_layers", "dense_layers", 3),
        ("lists", "list_per", "query_head"),
    ],
    "blocktopk": [("budget", "budget_tokens", 512), ("block", "page_tokens", 32)],
}
CASES = [(method, *knob) for method, knobs in RENAMED.items() for knob in knobs]


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> Iterator[None]:
    former_names._log_once.cache_clear()
    yield
    former_names._log_once.cache_clear()


# Knobs of a method without which one of the values above is refused.
BESIDE: dict[str, dict[str, Any]] = {"dhsa": {"bound_weight": 0.0}}


def chosen(method: str) -> dict[str, Any]:
    """Extras that choose a method in all its phases."""
    extras = {f"sparse_{phase}": method for phase, methods in PHASES.items() if method in methods}
    return extras | {f"{method}_{knob}": value for knob, value in BESIDE.get(method, {}).items()}


def test_every_former_name_is_tried_here_and_leads_to_a_knob() -> None:
    found = {
        (name, former, present)
        for methods in PHASES.values()
        for name, method in methods.items()
        for former, present in method.former_names.items()
    }
    assert found == {(method, former, present) for method, former, present, _ in CASES}
    for phase, methods in PHASES.items():
        for name, method in methods.items():
            knobs = knob_schema(phase, name)
            assert set(method.former_names.values()) <= knobs.keys()
            assert not method.former_names.keys() & knobs.keys()


@pytest.mark.parametrize(("method", "former", "present", "value"), CASES)
def test_a_request_may_use_a_former_name(
    method: str, former: str, present: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if any(former_server_knob(phase, method, present) for phase in PHASES):
        with pytest.raises(SparseParamsError, match=f"{method}_{former} .*is a setting of the server"):
            resolve({**chosen(method), f"{method}_{former}": value}, ALL_ENABLED, LAYERS)
        return
    with caplog.at_level(logging.WARNING, "vllm.sparse"):
        old, again = (resolve({**chosen(method), f"{method}_{former}": value}, ALL_ENABLED, LAYERS) for _ in range(2))
    new = resolve({**chosen(method), f"{method}_{present}": value}, ALL_ENABLED, LAYERS)
    assert old == again == new != resolve(chosen(method), ALL_ENABLED, LAYERS)
    assert cache_salt(old, "user") == cache_salt(new, "user")
    assert [record.getMessage() for record in caplog.records] == [
        f"Sparse attention: {method}_{former} is now called {method}_{present}; the former name works in this release "
        "only."
    ]


def former_server_knob(phase: str, method: str, knob: str) -> bool:
    return method in PHASES[phase] and knob in PHASES[phase][method].server_knobs


@pytest.mark.parametrize(("method", "former", "present", "value"), CASES)
def test_a_configuration_may_use_a_former_name(
    method: str, former: str, present: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vllm.sparse"):
        beside = BESIDE.get(method, {})
        old, again = (
            parse_server_config({"sparse": {method: {former: value, **beside}}}, LAYERS, HEADS) for _ in range(2)
        )
    assert old == again == parse_server_config({"sparse": {method: {present: value, **beside}}}, LAYERS, HEADS)
    assert old.knobs(method) == {present: value, **beside}
    assert [f"{method}_{former}" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(("method", "former", "present", "value"), CASES)
def test_both_names_at_once_are_refused(method: str, former: str, present: str, value: Any) -> None:
    named = f"{method}_{former} is the former name of {method}_{present}, which is set too"
    extras = {**chosen(method), f"{method}_{present}": value, f"{method}_{former}": value}
    with pytest.raises(SparseParamsError, match=named) as refused:
        resolve(extras, ALL_ENABLED, LAYERS)
    assert refused.value.key == f"{method}_{former}"
    with pytest.raises(ValueError, match=f"--additional-config: object sparse: {named}"):
        parse_server_config({"sparse": {method: {former: value, present: value}}}, LAYERS, HEADS)


def test_an_error_names_the_key_that_was_given() -> None:
    with pytest.raises(SparseParamsError, match=r"^tidal_budget is the former name of .* is 3; an integer") as refused:
        resolve({"sparse_decode": "tidal", "tidal_budget": 3}, ALL_ENABLED, LAYERS)
    assert (refused.value.key, refused.value.value) == ("tidal_budget", 3)


def test_a_request_sets_a_knob_that_the_configuration_names_otherwise() -> None:
    config = parse_server_config({"sparse": {"decode": "tidal", "tidal": {"budget": 512}}}, LAYERS, HEADS)
    for key in ("tidal_budget", "tidal_budget_tokens"):
        params = resolve({key: 99}, config, LAYERS)
        assert params.decode is not None
        assert params.decode.budget_tokens == 99
