"""Queries row by row, in PyTorch against plain Python, and in Triton: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.chunks import SPANS, STEP_TOKENS, some_chunks
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.row_queries import reference
from vllm_sparse.step.chunks import LaunchRows, launch_rows

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=5)


def rows_of(list_heads: int, device: str) -> LaunchRows:
    """Of two groups of chunks with query blocks of their own."""
    groups = [some_chunks(128, device), some_chunks(64, device)]
    return launch_rows(groups, list_heads, 1, torch.device(device))


def test_rows_hold_the_queries_of_their_lists() -> None:
    query = torch.randn(STEP_TOKENS, 6, 5)
    rows = rows_of(3, "cpu")
    gathered = reference.gather_rows(query, rows)
    # By the number of a list: its queries.
    expected: list[torch.Tensor] = []
    heads: list[int] = []
    for query_block in (128, 64):
        for span in SPANS:
            chunk = query[span.query_start : span.query_start + span.query_tokens]
            for head in range(3):
                for block in torch.split(chunk, query_block):
                    expected.append(block[:, 2 * head : 2 * head + 2])
                    heads.append(head)
    assert sorted(rows.lists.tolist()) == list(range(len(expected)))
    for row, number in enumerate(rows.lists.tolist()):
        start, stop = rows.starts[row : row + 2].tolist()
        assert torch.equal(gathered[start:stop], expected[number])
        assert int(rows.list_head[row]) == heads[number]
    assert rows.tokens == gathered.shape[0]


def test_outputs_come_back_where_the_chunks_are() -> None:
    query = torch.randn(STEP_TOKENS, 6, 5)
    rows = rows_of(2, "cpu")
    output = torch.zeros_like(query)
    reference.scatter_rows(reference.gather_rows(query, rows), rows, output)
    served = torch.zeros(STEP_TOKENS, dtype=torch.bool)
    for span in SPANS:
        served[span.query_start : span.query_start + span.query_tokens] = True
    assert torch.equal(output, query * served[:, None, None])


@needs_triton
@pytest.mark.parametrize(("heads", "list_heads", "head_size"), [(6, 6, 80), (6, 2, 64), (7, 1, 128)])
def test_triton_equals_the_reference(heads: int, list_heads: int, head_size: int) -> None:
    """Of queries that lie in a wider row, as a fused projection leaves them."""
    from vllm_sparse.kernels.row_queries import triton as rows_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(STEP_TOKENS, heads + 2, head_size, generator=generator).to(DEVICE)[:, 1:-1]
    rows = launch_rows([some_chunks(128, DEVICE)], list_heads, 1, query.device)
    gathered = rows_triton.gather_rows(query, rows)
    assert torch.equal(gathered, reference.gather_rows(query, rows)), f"seed {seed}"
    outputs = [torch.zeros(query.shape, device=DEVICE) for _ in range(2)]
    for implementation, output in zip((reference, rows_triton), outputs, strict=True):
        implementation.scatter_rows(gathered, rows, output)
    assert torch.equal(*outputs), f"seed {seed}"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize("to_rows", [False, True])
def test_kernel_compiles_for_hopper(to_rows: bool) -> None:
    from vllm_sparse.kernels.row_queries import triton as rows_triton

    compile_for_hopper(
        rows_triton.copy_rows_kernel,
        {
            **dict.fromkeys(("step_pointer", "row_pointer"), "*bf16"),
            **dict.fromkeys(("first_token_pointer", "list_head_pointer", "start_pointer"), "*i32"),
            "step_token_stride": "i32",
        },
        {"WIDTH": 448, "WIDTH_TILE": 512, "TOKEN_TILE": 16, "TO_ROWS": to_rows},
        num_warps=8,
    )
