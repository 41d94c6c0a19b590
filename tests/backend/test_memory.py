"""What a GPU server keeps beside its KV cache is accounted for before the cache gets the rest."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.decode_graphs import DecodeGraphs, captured_sizes
from vllm_sparse.backend.memory import (
    GRAPH_BYTES,
    BesideCache,
    SelectionMemory,
    beside_cache,
    configured_decode_methods,
    methods_at_once,
)
from vllm_sparse.backend.summaries import StoredSummaries
from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import METHODS, knob_schema
from vllm_sparse.config.server import server_config
from vllm_sparse.methods.registry import PREFILL_METHODS
from vllm_sparse.server.admission import resolve_for
from vllm_sparse.step.rows import ServerSize

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, LONGEST, REQUESTS, CHUNK = 16, 8, 2, 64, 32768, 48, 8192
CAPTURED = [1, 2, 4, *range(8, 49, 8), 64]


def server(max_model_len: int = LONGEST, cache_dtype: str = "auto", **settings: Any) -> Any:
    """vLLM's configuration of a server on a GPU, as far as memory depends on it."""
    from vllm.config.compilation import CUDAGraphMode

    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: LAYERS,
        get_layers_start_end_indices=lambda parallel: (0, LAYERS),
        hf_text_config=SimpleNamespace(),
        model_arch_config=SimpleNamespace(total_num_attention_heads=HEADS),
        max_model_len=max_model_len,
        get_num_attention_heads=lambda parallel: HEADS,
        get_num_kv_heads=lambda parallel: KV_HEADS,
        get_head_size=lambda: HEAD_SIZE,
        dtype=torch.bfloat16,
    )
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="SPARSE"), backend_per_kind=None),
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        additional_config={"sparse": settings},
        parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=CHUNK, max_num_seqs=REQUESTS),
        use_v2_model_runner=True,
        speculative_config=None,
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_capture_sizes=CAPTURED
        ),
    )


def test_a_stage_of_a_pipeline_counts_its_own_layers() -> None:
    config = server(methods=["hip", "blocktopk"])
    config.compilation_config.cudagraph_capture_sizes = [4, 5, 6, 7]
    whole = beside_cache(config)
    config.model_config.get_layers_start_end_indices = lambda parallel: (2, LAYERS)
    last = beside_cache(config)
    # Layers 0 and 1 are dense and keep no summaries, but are part of the whole model's cache.
    assert last.cache_share > whole.cache_share
    assert last.buffer_bytes < whole.buffer_bytes
    assert last.graph_bytes == whole.graph_bytes
    config.parallel_config.pipeline_parallel_size = 2
    assert beside_cache(config).graph_bytes > last.graph_bytes, "each of vLLM's sizes is captured"
    config.model_config.get_layers_start_end_indices = lambda parallel: (LAYERS, LAYERS)
    assert beside_cache(config) == BesideCache(0, 0, 0.0)


@pytest.mark.parametrize("methods", [["tidal"], ["tidal", "hip"], ["tidal", "hip", "blocktopk", "tokentopk"]])
def test_buffers_and_graphs_are_as_many_as_are_made(methods: list[str]) -> None:
    config = server(methods=methods)
    found = beside_cache(config)
    size = ServerSize(REQUESTS, LONGEST, LAYERS, KV_HEADS)
    at_once = methods_at_once(configured_decode_methods(server_config(config)), LONGEST)
    buffers = DecodeBuffers(REQUESTS, size, at_once, 4352, torch.device("cpu"))
    assert found.buffer_bytes == buffers.bytes > 0
    graphs = DecodeGraphs(buffers, at_once, speculative=False)
    graphs.sizes = captured_sizes([size for size in CAPTURED if size <= REQUESTS])
    assert found.graph_bytes == int(sum(len(graphs.sizes_of(name)) for name in graphs.launches) * GRAPH_BYTES)


def test_servers_without_graphs_or_batches_keep_less() -> None:
    from vllm.config.compilation import CUDAGraphMode

    eager, drafting, alone, own = server(), server(), server(decode_in_batches=False), server()
    eager.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    drafting.speculative_config = object()
    own.use_v2_model_runner = False
    for config in (eager, drafting, own):
        found = beside_cache(config)
        assert (found.graph_bytes, found.buffer_bytes > 0) == (0, True)
    assert beside_cache(alone) == BesideCache(0, 0, 0.0)
    assert beside_cache(server(methods=["sale"])) == BesideCache(0, 0, 0.0)


@pytest.mark.parametrize(
    ("settings", "methods"),
    [
        ({}, ["blocktopk"]),
        ({"blocktopk": {"scores": "mean", "page_tokens": 32}}, ["blocktopk"]),
        ({"blocktopk": {"scores": "float8_bounds", "dense_layers": 5}}, ["blocktopk"]),
        ({"tokentopk": {"page_tokens": 128}}, ["tokentopk"]),
        ({"tokentopk": {"reuse_layers": [6, 8]}}, ["tokentopk", "blocktopk"]),
    ],
)
@pytest.mark.parametrize(("cache_dtype", "dtype"), [("auto", torch.bfloat16), ("fp8", torch.float8_e4m3fn)])
@pytest.mark.usefixtures("engine")
def test_summaries_take_the_share_that_is_reserved(
    settings: dict[str, Any], methods: list[str], cache_dtype: str, dtype: torch.dtype
) -> None:
    config = server(methods=methods, decode_in_batches=False, cache_dtype=cache_dtype, **settings)
    cache = torch.empty(6, KV_HEADS, 128, 2 * HEAD_SIZE, dtype=dtype)
    stored = 0
    for method in configured_decode_methods(server_config(config)):
        layers = sum(role.writes_list for role in method.layer_roles(LAYERS))
        assert method.summaries is not None
        stored += layers * StoredSummaries().of(method.summaries, cache).nbytes
    assert beside_cache(config).cache_share * cache.nbytes * LAYERS == pytest.approx(stored)


def test_scores_of_rows_count_where_methods_score_contexts() -> None:
    share = beside_cache(server(methods=["tidal"])).cache_share
    assert share == pytest.approx(4 * HEADS / (2 * HEAD_SIZE * 2 * KV_HEADS * LAYERS))
    assert beside_cache(server(methods=["hip"])).cache_share == 0


@given(
    available=st.integers(0, 200 << 30),
    buffers=st.integers(0, 4 << 30),
    graphs=st.integers(0, 4 << 30),
    share=st.floats(0, 1),
)
def test_cache_and_what_is_beside_it_fit(available: int, buffers: int, graphs: int, share: float) -> None:
    left = BesideCache(buffers, graphs, share).left_for_cache(available)
    if left > 0:
        assert left * (1 + share) + buffers + graphs <= available * (1 + 1e-9)
        assert (left + 2) * (1 + share) + buffers + graphs >= available * (1 - 1e-9), "no more than is needed"
    else:
        assert available <= buffers + graphs + 1, "vLLM says that there is no memory"


FINER = [
    (name, knobs)
    for name in PREFILL_METHODS
    for knobs in (
        {},
        {"list_per": "query_head"},
        {"scores_per": "query_head"},
        {"query_block_tokens": 64},
        {"list_per": "query_head", "query_block_tokens": 64},
    )
    if knobs.keys() <= knob_schema("prefill", name).keys()
]


@given(
    finer=st.sampled_from(FINER),
    list_per=st.sampled_from(["query_head", "kv_head"]),
    query_block=st.sampled_from([64, 128]),
    mib=st.sampled_from([1, 4, 30, 2048]),
    longest=st.sampled_from([4096, 32768, 1 << 20]),
)
def test_any_allowed_prompt_chunk_fits_what_profiling_took(
    finer: tuple[str, dict[str, Any]], list_per: str, query_block: int, mib: int, longest: int
) -> None:
    name, knobs = finer
    limits = {"list_per": list_per, "query_block_tokens": query_block, "selection_mib": mib}
    config = server(longest, methods=list(METHODS), limits=limits)
    taken = SelectionMemory(config).bytes
    extras = {"sparse_prefill": name, **{f"{name}_{knob}": value for knob, value in knobs.items()}}
    try:
        method = resolve_for(config, extras).at(longest).prefill
    except SparseParamsError as error:
        assert "limits." in str(error)  # noqa: PT017
        return
    if method is not None:
        assert method.selection_bytes(min(CHUNK, longest), longest, HEADS, KV_HEADS) <= taken


def test_no_more_is_taken_than_an_allowed_prompt_chunk_needs() -> None:
    for methods, finest in ((["hip"], "query_head"), (["dhsa"], "kv_head")):
        config = server(methods=methods, limits={"list_per": finest})
        knobs = {"list_per", "scores_per"} & knob_schema("prefill", methods[0]).keys()
        wanted = {f"{methods[0]}_{knob}": "query_head" for knob in knobs}
        extras = {"sparse_prefill": methods[0], f"{methods[0]}_query_block_tokens": 64, **wanted}
        with_finest = resolve_for(server(methods=methods), extras).at(LONGEST).prefill
        assert with_finest is not None
        needed = with_finest.selection_bytes(CHUNK, LONGEST, HEADS, KV_HEADS)
        assert SelectionMemory(config).bytes == needed


def test_a_server_without_prompt_methods_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SelectionMemory(server(methods=["tidal"]))
    assert memory.bytes == 0
    monkeypatch.setattr(torch, "empty", None)
    memory.take(torch.zeros(4, HEADS, HEAD_SIZE))


def test_it_is_taken_beside_the_queries_that_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SelectionMemory(server(methods=["hip"]))
    query, taken = torch.zeros(4, HEADS, HEAD_SIZE), []
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: taken.append((size, dtype, device)))
    memory.take(query)
    assert taken == [(memory.bytes + 2 * query.nbytes, torch.uint8, query.device)]


@pytest.mark.parametrize(("fixed", "sparse"), [(None, True), (1 << 30, True), (None, False)])
def test_the_worker_gives_the_cache_the_rest(monkeypatch: pytest.MonkeyPatch, fixed: int | None, sparse: bool) -> None:
    """Unless its size was set, or another backend serves."""
    from vllm_sparse.hooks import gpu_worker

    class Worker:
        """Of vLLM, after profiling."""

        vllm_config = server(methods=["tidal", "blocktopk"])
        cache_config = SimpleNamespace(kv_cache_memory_bytes=fixed)
        available_kv_cache_memory_bytes = 100 << 30

        @torch.inference_mode()
        def determine_available_memory(self) -> int:
            return self.available_kv_cache_memory_bytes

    if not sparse:
        Worker.vllm_config.attention_config.backend.name = "FLASH_ATTN"
    module: Any = ModuleType("vllm.v1.worker.gpu_worker")
    module.Worker = Worker
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", module)
    gpu_worker.install()
    gpu_worker.install()
    worker = Worker()
    left = worker.determine_available_memory()
    assert left == worker.available_kv_cache_memory_bytes
    if fixed or not sparse:
        assert left == 100 << 30
    else:
        beside = beside_cache(Worker.vllm_config)
        assert left == beside.left_for_cache(100 << 30)
        assert left < (100 << 30) / (1 + beside.cache_share)


def test_layers_take_it_before_there_is_a_cache(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in dense steps that come later."""
    layer = engine.layers[0]
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(type(layer.impl), "take_selection_memory", lambda self, query: taken.append(query))
    query = torch.zeros(4, 8, 64)
    for cache in (torch.tensor([]), torch.zeros(2, 2, 32, 128)):
        layer.impl.forward(layer, query, query[:, :2], query[:, :2], cache, None, torch.empty_like(query))
    assert [one is query for one in taken] == [True]
