"""What start-up compiles is all that later requests need, whatever their lengths and however many there are.

Triton looks for a compiled kernel by what it specialises on. So no kernel is compiled or launched here: each launch is
noted as if on a Hopper GPU, over zeros.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from vllm_sparse.backend.decode_batch import BatchLayer, DecodeStep
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.decode_graphs import DENSE_ROW, DecodeGraphs, captured_sizes
from vllm_sparse.backend.warm_up import warm_up_chunks
from vllm_sparse.kernels.page_list import launch_lists
from vllm_sparse.kernels.row_queries import gather_rows, scatter_rows
from vllm_sparse.keys import PlainKeys
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS
from vllm_sparse.pages import empty_lists
from vllm_sparse.step.chunks import PromptChunks, launch_rows, prompt_blocks
from vllm_sparse.step.launch import Executor, Launch, LayerLaunches
from vllm_sparse.step.plan import RowSpan, layer_roles
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.step.rows import ServerSize, padded_rows

triton = pytest.importorskip("triton")

HEAD_SIZE, BLOCK = 128, 128
# So that at start-up everything begins at multiples of 16 bytes, which Triton specialises on.
STEP, SHORTEST, LONGEST = 2048, 4096, 16384
CHUNKS, STEPS = 60, 60
LAYERS, BLOCKS, LIST_TOKENS = 6, 40, 4352
# As vLLM's default graphs have.
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48)


class Hopper:
    """What Triton asks its driver for before it launches."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "nowhere"

    def get_current_stream(self, device: str) -> None:
        return None


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Kernels with what they are specialised on."""
    found: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **_: object) -> bool:
        found.add((fn.name, key))
        # "Do not compile it", nor launch it.
        return True

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (8, 2)])
@pytest.mark.parametrize("name", [*PREFILL_METHODS, "dhsa in two stages"])
def test_no_chunk_waits_for_the_compiler(name: str, heads: int, kv_heads: int, launched: set[tuple[str, str]]) -> None:
    two_stages = Dhsa(bound_weight=0.5, candidate_factor=2.0)
    method: Any = PREFILL_METHODS[name]() if name in PREFILL_METHODS else two_stages
    assert isinstance(method, PrefillMethod)
    cache = torch.zeros(LONGEST // BLOCK, kv_heads, BLOCK, 2 * HEAD_SIZE, dtype=torch.bfloat16)

    def serve(*sizes: tuple[int, int]) -> None:
        """Chunks of so many tokens of so long contexts, in one step."""
        starts = itertools.accumulate((tokens for tokens, _ in sizes), initial=0)
        spans = [RowSpan(row, start, *size) for row, (start, size) in enumerate(zip(starts, sizes, strict=False))]
        query = torch.zeros(sum(tokens for tokens, _ in sizes), heads, HEAD_SIZE, dtype=torch.bfloat16)
        table = torch.arange(cache.shape[0], dtype=torch.int32).expand(len(sizes), -1).contiguous()
        keys = tuple(PlainKeys(cache, table[row], seq_len) for row, (_, seq_len) in enumerate(sizes))
        blocks = prompt_blocks(spans, method.query_block_tokens, query.device)
        page_size_tokens = min(BLOCK, method.page_tokens)
        list_heads = method.list_heads(heads, kv_heads)
        lists = empty_lists(
            list_heads * blocks.blocks, -(-blocks.longest_seq_len // page_size_tokens), page_size_tokens, query.device
        )
        layers = [Layer(method.dense_layers, 0)] * len(sizes)
        chunks = PromptChunks(blocks, query, keys, table, HEAD_SIZE**-0.5)
        method.select_chunks(chunks, layers, method.prepare(blocks, [None] * len(sizes)), lists)
        rows = launch_rows([blocks], list_heads, kv_heads, query.device)
        launch_lists(lists, rows, table, BLOCK, kv_heads)
        scatter_rows(gather_rows(query, rows), rows, torch.zeros_like(query))

    for chunk in warm_up_chunks(method, STEP, SHORTEST, LONGEST):
        serve((chunk.tokens, chunk.seq_len))
    at_start = set(launched)
    assert at_start
    for _ in range(CHUNKS):
        count = random.randint(1, 3)
        sizes = [
            (
                random.choice((STEP // count, random.randint(method.min_query_tokens, STEP // count))),
                random.randint(SHORTEST, LONGEST),
            )
            for _ in range(count)
        ]
        serve(*sizes)
        assert launched <= at_start, f"tokens and contexts {sizes}"


class Nothing(Executor):
    """Leaves the output alone."""

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        pass


def test_rows_are_padded_as_in_graphs() -> None:
    padded = [padded_rows(rows) for rows in range(1, GRAPH_ROWS[-1] + 1)]
    assert tuple(sorted(set(padded))) == GRAPH_ROWS
    assert all(size >= rows for rows, size in enumerate(padded, 1))
    assert [padded_rows(rows) for rows in GRAPH_ROWS] == list(GRAPH_ROWS)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "knobs"),
    [
        (1, 1, {}),
        (4, 1, {}),
        (14, 2, {}),
        (32, 8, {}),
        (20, 5, {"blocktopk": {"candidate_factor": 4, "coverage": 0.9, "scores": "float8_bounds"}}),
    ],
)
def test_no_decode_step_waits_for_the_compiler(
    heads: int, kv_heads: int, knobs: dict[str, dict[str, Any]], launched: set[tuple[str, str]]
) -> None:
    """Steps outside of graphs, beside a chunk of another request, after the graphs were captured."""
    most_rows, longest = GRAPH_ROWS[-1], 16000
    methods = [method(**knobs.get(name, {})) for name, method in DECODE_METHODS.items() if not knobs or name in knobs]
    served = [method for method in methods if isinstance(method, BatchDecodeMethod)]
    size = ServerSize(most_rows, longest, LAYERS, kv_heads)
    buffers = DecodeBuffers(most_rows, size, served, LIST_TOKENS, torch.device("cpu"))
    cache = torch.zeros(BLOCKS, kv_heads, BLOCK, 2 * HEAD_SIZE, dtype=torch.bfloat16)
    kinds = {method.summaries for method in served if method.summaries is not None}
    summaries = {
        kind: torch.zeros(
            BLOCKS, kv_heads, BLOCK // kind.page_tokens, kind.width(HEAD_SIZE), dtype=kind.dtype(cache.dtype)
        )
        for kind in kinds
    }
    # Of an odd number of blocks, so that rows begin anywhere.
    contexts = torch.full((most_rows,), longest, dtype=torch.int32)
    table = torch.zeros(most_rows, longest // BLOCK, dtype=torch.int32)
    assert table.shape[1] % 2

    def setting(method: BatchDecodeMethod, slot: int) -> RowSetting:
        return RowSetting(method, 0, layer_roles(method, LAYERS), slot, False)

    def serve(launches: list[LayerLaunches], rows: slice | torch.Tensor, capacity_tokens: int) -> None:
        seq_len = contexts[rows]
        count = seq_len.shape[0]
        step = DecodeStep(buffers, count, launches, seq_len, table[rows], capacity_tokens)
        for layer in range(LAYERS):
            query = torch.zeros(count, heads, HEAD_SIZE, dtype=cache.dtype)
            output = torch.zeros_like(query)
            step.attend(BatchLayer(layer, query, cache, 0.1, output, Nothing(), lambda *_: None, summaries))

    mixtures = [[method] for method in served] + [served]
    graphs = DecodeGraphs(buffers, served, LAYERS, speculative=False)
    graphs.sizes = captured_sizes(GRAPH_ROWS)
    for name, launches in graphs.launches.items():
        for count in graphs.sizes_of(name):
            buffers.tell([DENSE_ROW] * count)
            serve(launches, slice(0, count), most_rows * longest)
    captured = set(launched)
    assert captured
    for _ in range(STEPS):
        count = random.randint(1, most_rows)
        mixture = random.choice(mixtures)
        settings = [setting(random.choice(mixture), slot) for slot in range(count)]
        buffers.tell(settings)
        first = random.randint(0, most_rows - count)
        rows = random.choice((slice(first, first + count), torch.randperm(most_rows)[:count]))
        serve(buffers.launches(settings, all_sparse=True), rows, random.randint(count * 5000, count * longest))
        assert launched <= captured, f"{count} rows of {[method.name for method in mixture]}"
