"""What start-up compiles is all that later requests need, whatever their lengths and however many there are.

Triton looks for a compiled kernel by what it specialises on. So no kernel is compiled or launched here: each launch is
noted as if on a Hopper GPU, over zeros.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.kernels.launches import (
    BLOCK_TOKENS,
    HOPPER,
    DecodeRoom,
    Noted,
    choose_for_chunks,
    note_launches,
    served_at_once,
)
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.decode_graphs import DENSE_ROW, DecodeGraphs, captured_sizes
from vllm_sparse.backend.warm_up import warm_up_chunks
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS
from vllm_sparse.step.plan import layer_roles
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.step.rows import ServerSize, padded_rows

pytest.importorskip("triton")

HEAD_SIZE = 128
# So that at start-up everything begins at multiples of 16 bytes, which Triton specialises on.
STEP, SHORTEST, LONGEST = 2048, 4096, 16384
CHUNKS, STEPS = 60, 60
LAYERS, BLOCKS, LIST_TOKENS = 6, 40, 4352
# As vLLM's default graphs have.
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Mapping[tuple[str, str], Noted]:
    """Kernels with what they are specialised on."""
    return note_launches(monkeypatch, HOPPER)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (8, 2)])
@pytest.mark.parametrize("name", [*PREFILL_METHODS, "dhsa, first stage", "flexprefill, stretches"])
def test_no_chunk_waits_for_the_compiler(
    name: str, heads: int, kv_heads: int, launched: Mapping[tuple[str, str], Noted]
) -> None:
    other = {"dhsa, first stage": Dhsa(bound_weight=0.0, candidate_factor=1.0), "flexprefill, stretches": FlexPrefill()}
    method: Any = PREFILL_METHODS[name]() if name in PREFILL_METHODS else other[name]
    # No value of this knob needs other kernels than those of a server that leaves it.
    of_request = FlexPrefill(sample_every_tokens=512) if "stretches" in name else None
    assert isinstance(method, PrefillMethod)
    cache = torch.zeros(LONGEST // BLOCK_TOKENS, kv_heads, BLOCK_TOKENS, 2 * HEAD_SIZE, dtype=torch.bfloat16)

    def serve(*sizes: tuple[int, int]) -> None:
        query = torch.zeros(sum(tokens for tokens, _ in sizes), heads, HEAD_SIZE, dtype=torch.bfloat16)
        choose_for_chunks(method, query, cache, sizes)

    for chunk in warm_up_chunks(method, STEP, SHORTEST, LONGEST):
        serve((chunk.tokens, chunk.seq_len))
    at_start = set(launched)
    assert at_start
    if of_request is not None:
        method = of_request
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
        assert set(launched) <= at_start, f"tokens and contexts {sizes}"


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
    heads: int, kv_heads: int, knobs: dict[str, dict[str, Any]], launched: Mapping[tuple[str, str], Noted]
) -> None:
    """Steps outside of graphs, beside a chunk of another request, after the graphs were captured."""
    most_rows, longest = GRAPH_ROWS[-1], 16000
    methods = [method(**knobs.get(name, {})) for name, method in DECODE_METHODS.items() if not knobs or name in knobs]
    served = served_at_once(methods)
    size = ServerSize(most_rows, longest, LAYERS, kv_heads)
    buffers = DecodeBuffers(most_rows, size, served, LIST_TOKENS, torch.device("cpu"))
    cache = torch.zeros(BLOCKS, kv_heads, BLOCK_TOKENS, 2 * HEAD_SIZE, dtype=torch.bfloat16)
    # Of an odd number of blocks, so that rows begin anywhere.
    contexts = torch.full((most_rows,), longest, dtype=torch.int32)
    table = torch.zeros(most_rows, longest // BLOCK_TOKENS, dtype=torch.int32)
    assert table.shape[1] % 2

    room = DecodeRoom(buffers, cache, heads, cache.dtype, contexts, table)

    def setting(method: BatchDecodeMethod, slot: int) -> RowSetting:
        return RowSetting(method, 0, layer_roles(method, LAYERS), slot, False)

    mixtures = [[method] for method in served] + [served]
    graphs = DecodeGraphs(buffers, served, speculative=False)
    graphs.sizes = captured_sizes(GRAPH_ROWS)
    for name, launches in graphs.launches.items():
        for count in graphs.sizes_of(name):
            buffers.tell([DENSE_ROW] * count)
            room.serve(launches, slice(0, count), most_rows * longest)
    captured = set(launched)
    assert captured
    for _ in range(STEPS):
        count = random.randint(1, most_rows)
        mixture = random.choice(mixtures)
        settings = [setting(random.choice(mixture), slot) for slot in range(count)]
        buffers.tell(settings)
        first = random.randint(0, most_rows - count)
        rows = random.choice((slice(first, first + count), torch.randperm(most_rows)[:count]))
        room.serve(buffers.launches(settings, all_sparse=True), rows, random.randint(count * 5000, count * longest))
        assert set(launched) <= captured, f"{count} rows of {[method.name for method in mixture]}"
