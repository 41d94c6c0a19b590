"""Limits of a server: what requests may ask for, by the knobs' own types."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.test_decode_room import server
from vllm_sparse.config.limits import Limits
from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import METHODS, PHASES, knob_schema
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.config.request import configured_method
from vllm_sparse.config.server import check_settings
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.kernels.low_bit_scores import scratch_bytes
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.registry import PREFILL_METHODS
from vllm_sparse.server.admission import resolve_for
from vllm_sparse.server.routes.methods import extras_schema

HIP = {"sparse_prefill": "hip"}
TIDAL = {"sparse_decode": "tidal"}
STRIDES = {**HIP, "hip_query_stride": [4, 2, 4]}
BLOCKS = {"sparse_prefill": "dhsa", "dhsa_query_block_tokens": 64}
FIVE_STAGES = {
    "hip_stage_block_tokens": [256, 128, 64, 32, 16],
    "hip_stage_budget_tokens": [4096, 2048, 1024, 512, 256],
    "hip_query_stride": [4] * 5,
}


def refused(extras: dict[str, Any], **settings: Any) -> str:
    """What a server says to a request that it refuses; empty if it takes it."""
    try:
        resolve_for(server(**settings), extras)
    except SparseParamsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("limits", "extras", "message"),
    [
        ({}, {**TIDAL, "sparse_min_tokens": 10**30}, "limits.min_tokens of this server allows at most 16777216 tokens"),
        ({"min_tokens": 9000}, {**TIDAL, "sparse_min_tokens": 9001}, "allows at most 9000 tokens"),
        ({"budget_tokens": 4096}, {**TIDAL, "tidal_budget_tokens": 4097}, "limits.budget_tokens of this server allows"),
        ({"budget_tokens": 40000}, {**HIP, "hip_stage_budget_tokens": [65536, 8192, 2048]}, "numbers of at most 40000"),
        ({"budget_tokens": 64}, {"sparse_prefill": "sale", "sale_recent_tokens": 129}, "allows at most 128"),
        ({}, {**HIP, **FIVE_STAGES}, "limits.stages of this server allows at most 4 stages"),
        ({"list_per": "kv_head"}, {**TIDAL, "tidal_list_per": "query_head"}, "of this server allows 'kv_head'"),
        ({"query_block_tokens": 128}, BLOCKS, "limits.query_block_tokens of this server allows 128"),
        (
            {"selection_mib": 1},
            {**HIP, "hip_list_per": "query_head"},
            "limits.selection_mib of this server allows 8 MiB for a prompt chunk of 8192 tokens at 32768, where this "
            "needs 10",
        ),
    ],
)
def test_requests_beyond_a_limit_are_refused(limits: dict[str, Any], extras: dict[str, Any], message: str) -> None:
    said = refused(extras, limits=limits)
    assert message in said
    assert "--additional-config, object sparse.limits, or PUT /v1/sparse/config" in said
    if extras.get("sparse_min_tokens", 0) <= UNBOUNDED_TOKENS:
        assert refused(extras, limits={"stages": 9}) == ""


def test_former_names_are_limited_and_named() -> None:
    assert refused({**TIDAL, "tidal_budget": 5000}, limits={"budget_tokens": 4096}).startswith("tidal_budget is 5000")


@pytest.mark.parametrize(
    ("own", "limits", "extras"),
    [
        ({"tidal": {"budget_tokens": 8192}}, {"budget_tokens": 4096}, {**TIDAL, "tidal_budget_tokens": 8192}),
        ({"tidal": {"list_per": "query_head"}}, {"list_per": "kv_head"}, {**TIDAL, "tidal_list_per": "query_head"}),
        ({"dhsa": {"query_block_tokens": 64}}, {"query_block_tokens": 128, "selection_mib": 1}, BLOCKS),
        ({"min_tokens": 9000}, {"min_tokens": 100}, {**TIDAL, "sparse_min_tokens": 9000}),
    ],
)
def test_what_the_server_has_itself_is_allowed(
    own: dict[str, Any], limits: dict[str, Any], extras: dict[str, Any]
) -> None:
    assert refused(extras, limits=limits) != ""
    assert refused(extras, limits=limits, **own) == ""


@pytest.mark.parametrize(("sink_tokens", "message"), [(128, ""), (129, "allows at most 128")])
def test_a_knob_of_both_phases_has_what_the_server_has_in_either(sink_tokens: int, message: str) -> None:
    """128 for prompts and 16 for generations are the baseline's defaults."""
    extras = {"sparse_prefill": "random", "random_sink_tokens": sink_tokens}
    said = refused(extras, methods=list(METHODS), limits={"budget_tokens": 16})
    assert (message in said) if message else said == ""


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    # While it is imported, vLLM asks the platform for more than this one says.
    importlib.import_module("vllm.config.compilation")
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda=lambda: True))


@pytest.mark.parametrize(
    ("new_kernels", "extras", "message"),
    [
        (
            "choices",
            STRIDES,
            "limits.new_kernels of this server allows numbers among 4, for which kernels are",
        ),
        ("none", STRIDES, "or set it to any"),
        ("none", BLOCKS, "limits.new_kernels of this server allows 128, for which kernels are compiled"),
        ("choices", BLOCKS, ""),
        ("choices", {**HIP, "hip_query_stride": [4, 4, 4]}, ""),
        ("any", STRIDES, ""),
    ],
)
@pytest.mark.usefixtures("on_cuda")
def test_knobs_that_compile_are_limited_on_a_gpu(new_kernels: str, extras: dict[str, Any], message: str) -> None:
    said = refused(extras, limits={"new_kernels": new_kernels})
    assert (message in said) if message else said == ""


def test_a_cpu_compiles_nothing() -> None:
    assert refused(STRIDES, limits={"new_kernels": "none"}) == ""


def test_defaults_take_every_method_and_preset_at_a_million_tokens() -> None:
    """With the heads of Llama-3.1-8B on one GPU, and not every finer choice."""
    llama = server(methods=list(METHODS))
    llama.model_config.max_model_len = 1 << 20
    llama.model_config.get_num_attention_heads = lambda parallel: 32
    llama.model_config.get_num_kv_heads = lambda parallel: 8
    llama.scheduler_config.max_num_batched_tokens = 16384
    for phase, methods in PHASES.items():
        for name in methods:
            resolve_for(llama, {f"sparse_{phase}": name})
    for name in PRESETS:
        resolve_for(llama, {"sparse_preset": name})
    with pytest.raises(SparseParamsError, match=r"limits.selection_mib of this server allows 2048 MiB .* needs 5056"):
        resolve_for(llama, {**HIP, "hip_list_per": "query_head", "hip_query_block_tokens": 64})


def test_each_knob_that_reads_tokens_has_a_limit() -> None:
    """A new method's knob of this kind does not escape by a forgotten mark."""
    for phase, methods in PHASES.items():
        for name in methods:
            for knob, schema in knob_schema(phase, name).items():
                if knob.endswith(("budget_tokens", "sink_tokens", "recent_tokens", "tail_tokens")):
                    assert schema.get("limit") == "budget_tokens", (name, knob)
                if knob in ("list_per", "query_block_tokens"):
                    assert (schema.get("limit"), schema.get("compiles")) == (knob, True), (name, knob)


LIMITS = st.builds(
    Limits,
    min_tokens=st.sampled_from([0, 100, UNBOUNDED_TOKENS]),
    budget_tokens=st.sampled_from([16, 100, 3000, UNBOUNDED_TOKENS]),
    stages=st.integers(1, 4),
    list_per=st.sampled_from(["query_head", "kv_head"]),
    query_block_tokens=st.sampled_from([64, 128]),
)
LIMITED = [
    (phase, name, knob)
    for phase, methods in PHASES.items()
    for name in methods
    for knob, schema in knob_schema(phase, name).items()
    if schema.get("limit")
]
VALUES: dict[str, list[Any]] = {
    "list_per": ["query_head", "kv_head"],
    "query_block_tokens": [64, 128],
    "stage_block_tokens": [[256, 64, 16], [256, 128, 64, 32, 16]],
    "stage_budget_tokens": [[32768, 8192, 2048], [65536, 8192, 2048]],
}


@given(limits=LIMITS, limited=st.sampled_from(LIMITED), data=st.data())
def test_the_schema_of_requests_tells_the_limits(
    limits: Limits, limited: tuple[str, str, str], data: st.DataObject
) -> None:
    """A request that the schema lets pass is within the limits, and one within the limits passes."""
    phase, name, knob = limited
    config = ServerConfig(methods=METHODS, limits=limits)
    own = getattr(configured_method(config, phase, name), knob)
    value = data.draw(st.sampled_from(VALUES.get(knob) or [max(own, 128), 2 * max(own, 128)]))
    extras = {f"sparse_{phase}": name, f"{name}_{knob}": value}
    said = refused(extras, methods=list(METHODS), limits=limits.model_dump())
    within = jsonschema.Draft202012Validator(extras_schema(config)).is_valid(extras)
    if said == "":
        assert within
    elif "limits." in said:
        assert not within
    # What knobs have to meet together no schema says.


def test_wrong_limits_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"sparse.limits.stages is 0"):
        check_settings({"limits": {"stages": 0}}, 8, 4)
    with pytest.raises(ValueError, match=r"sparse.limits.budget is 5: .*; there are min_tokens, budget_tokens, stages"):
        check_settings({"limits": {"budget": 5}}, 8, 4)
    with pytest.raises(ValueError, match=r"sparse.min_tokens"):
        check_settings({"min_tokens": 10**30}, 8, 4)


def test_memory_grows_with_finer_lists() -> None:
    for name, method in PREFILL_METHODS.items():
        made: Any = method
        coarse: PrefillMethod = made(list_per="kv_head", query_block_tokens=128)
        fine: PrefillMethod = made(list_per="query_head", query_block_tokens=64)
        size = (4096, 65536, 32, 8)
        if name == "flexprefill":
            # Its samples take more than its lists, and the same for both; their lines lie beside them.
            lines = 8 * 2 * 16 * 32 * 512
            assert coarse.selection_bytes(*size) == (1 << 28) + lines
            assert fine.selection_bytes(*size) == (1 << 28) + 2 * lines
            continue
        if name == "sale":
            # Quantised keys of its chunks, as much for both.
            quantised = scratch_bytes(32, 2048, 8)
            lists = fine.selection_bytes(*size) - quantised, coarse.selection_bytes(*size) - quantised
            assert lists[0] == 8 * lists[1] > 0
            continue
        if name == "hip":
            # Scores and marks of its stages are the KV head's for both, and of finer query blocks more.
            assert 8 * coarse.selection_bytes(*size) > fine.selection_bytes(*size) > coarse.selection_bytes(*size)
            continue
        if name == "dhsa":
            # Its second stage takes the same for both, and of finer query blocks more.
            assert 8 * coarse.selection_bytes(*size) > fine.selection_bytes(*size) > coarse.selection_bytes(*size)
            coarse = made(list_per="kv_head", query_block_tokens=128, candidate_factor=1.0)
            fine = made(list_per="query_head", query_block_tokens=64, candidate_factor=1.0)
        assert fine.selection_bytes(*size) == 8 * coarse.selection_bytes(*size) > 0, name


def test_memory_of_a_second_stage() -> None:
    """Kept masses have a bound, but for the query blocks of one program and a very long context."""
    one, both, everything = Dhsa(candidate_factor=1.0), Dhsa(density=0.2), Dhsa()

    def more(query_tokens: int, seq_len: int) -> int:
        size = (query_tokens, seq_len, 28, 4)
        return both.selection_bytes(*size) - one.selection_bytes(*size)

    def of_all_pages(query_tokens: int, seq_len: int) -> int:
        size = (query_tokens, seq_len, 28, 4)
        return everything.selection_bytes(*size) - one.selection_bytes(*size)

    # 9 bytes for each candidate list and page, and 4 for each of 16 queries of 7 heads, padded to 8.
    assert more(128, 32768) == 4 * 1024 * (9 + 4 * 16 * 8)
    assert more(8192, 1 << 20) == 4 * 64 * 32768 * 9 + (1 << 29)
    assert more(128, 1 << 27) == 4 * (1 << 22) * (9 + 4 * 16 * 8)
    # Without candidates' lists.
    assert of_all_pages(128, 32768) == 4 * 1024 * 4 * 16 * 8
    assert of_all_pages(8192, 1 << 20) == 1 << 29
    assert of_all_pages(128, 1 << 27) == 4 * (1 << 22) * 4 * 16 * 8
