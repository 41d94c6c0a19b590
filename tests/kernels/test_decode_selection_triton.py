"""TidalDecode's selection for all rows of a step equals the one for single requests: compiled on a GPU, interpreted
elsewhere."""

from __future__ import annotations

import importlib
import random

import pytest
import torch

from tests import oracle
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Paged, Platform, has_hopper
from vllm_sparse.kernels.token_scores import reference as token_scores_reference
from vllm_sparse.kernels.top_tokens import reference as top_tokens_reference
from vllm_sparse.step.rows import DecodeRows, RowScores, TokenLists

pytest.importorskip("triton")

PLATFORM = Platform("plain", DEVICE, torch.float32, None)
SCALE = 0.13
POISON = -7


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=14)


def rows_of(data: Paged, query: torch.Tensor, takes_part: list[bool]) -> DecodeRows:
    contexts = [keys.shape[1] if part else 0 for keys, part in zip(data.keys, takes_part, strict=True)]
    seq_len = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    return DecodeRows(query, data.kv_cache, data.block_table, seq_len, SCALE)


def empty_lists(lists: int, width: int) -> TokenLists:
    slots = torch.full((lists, width), POISON, dtype=torch.int32, device=DEVICE)
    return TokenLists(slots, torch.full((lists,), POISON, dtype=torch.int32, device=DEVICE))


@needs_triton
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(2, 2, 64), (8, 2, 32), (7, 1, 80), (8, 1, 128)])
@pytest.mark.parametrize(("block_size", "sum_heads"), [(16, False), (128, True)])
def test_scores_equal_the_reference(
    heads: int, kv_heads: int, head_size: int, block_size: int, sum_heads: bool
) -> None:
    from vllm_sparse.kernels.token_scores.triton import token_scores_of_rows

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    contexts = [1, 1000, 129, 77, 128, 2049]
    takes_part = [True, True, False, True, True, True]
    data = oracle.random_paged(PLATFORM, generator, contexts, kv_heads, head_size, block_size)
    query = oracle.random_tensor(PLATFORM, generator, len(contexts), heads, head_size, spread=3)
    rows = rows_of(data, query, takes_part)
    # Rows lie in any order, with gaps.
    order = torch.randperm(len(contexts), generator=generator).tolist()
    starts = torch.zeros(len(contexts), dtype=torch.int64)
    taken = 0
    for row in order:
        starts[row] = taken
        taken += contexts[row] + 3
    scores = token_scores_of_rows(rows, starts.to(DEVICE), taken, sum_heads)
    assert scores.unit_tokens == 1
    for row, context in enumerate(contexts):
        if not takes_part[row]:
            continue
        expected = token_scores_reference.token_scores(query[row], data.reader(row), SCALE, merge_heads=not sum_heads)
        if sum_heads:
            expected = expected.view(kv_heads, -1, context).logsumexp(1)
        for head in range(kv_heads):
            first = int(scores.starts[row]) + head * scores.head_stride
            actual = scores.values.flatten()[first : first + context]
            error = float((actual - expected[head]).abs().max())
            assert error < 1e-4 * (1 + float(expected[head].abs().max())), f"row {row}, head {head}, seed {seed}"


@pytest.mark.parametrize("unit", [1, 16, 64])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("triton", marks=needs_triton),
        pytest.param("cuda", marks=pytest.mark.skipif(not has_hopper(), reason="no Hopper GPU")),
    ],
)
def test_lists_equal_the_reference(unit: int, ties: bool, implementation: str) -> None:
    """Bit for bit, given the scores: any sign, both zeros, minus infinity, equal scores on both sides of the cut."""
    top_tokens = importlib.import_module(f"vllm_sparse.kernels.top_tokens.{implementation}").top_tokens
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    contexts = [1, 9000, 63, 700, 64, 65, 300, 5000]
    kv_heads, block_size = 2, 64
    knobs = [
        (16, 0, 0),
        (2048, 16, 64),
        (16, 3, 5),
        (128, 100, 28),
        (4096, 16, 64),
        (64, 0, 64),
        (64, 16, 16),
        (1, 0, 0),
    ]
    takes_part = [True] * 6 + [False, True]
    data = oracle.random_paged(PLATFORM, generator, contexts, kv_heads, 16, block_size)
    rows = rows_of(data, torch.zeros(len(contexts), kv_heads, 16, device=DEVICE), takes_part)
    head_stride = max(contexts) + 5
    values = torch.randn(len(contexts) * kv_heads * head_stride, generator=generator) * 10
    if ties:
        values = values.round() / 4
        values[::7] = -0.0
        values[3::11] = float("-inf")
    starts = torch.arange(len(contexts)) * kv_heads * head_stride
    scores = RowScores(values.to(DEVICE), starts.to(DEVICE), head_stride, unit)
    knob_tensor = torch.tensor(knobs, dtype=torch.int32, device=DEVICE).repeat(1, 2)[:, 3:]
    width = max(budget for budget, *_ in knobs) + 2 * unit
    expected, actual = (empty_lists(len(contexts) * kv_heads, width) for _ in range(2))
    top_tokens_reference.top_tokens(scores, rows, knob_tensor, expected)
    top_tokens(scores, rows, knob_tensor, actual)
    assert torch.equal(actual.kept_tokens, expected.kept_tokens), f"seed {seed}"
    for index, kept in enumerate(actual.kept_tokens.tolist()):
        assert torch.equal(actual.slots[index, : max(kept, 0)], expected.slots[index, : max(kept, 0)]), (index, seed)
    assert (actual.kept_tokens == POISON).sum() == kv_heads, "only the row that takes no part keeps what it had"
    assert bool((actual.slots[6 * kv_heads : 7 * kv_heads] == POISON).all())


@pytest.mark.skipif(not has_hopper(), reason="no Hopper GPU")
@pytest.mark.parametrize("rows", [1, 5, 12, 40], ids=["8-blocks", "4-blocks", "2-blocks", "1-block"])
def test_long_lists_equal_the_reference_in_clusters_of_any_size(rows: int) -> None:
    from vllm_sparse.kernels.top_tokens import cuda

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    kv_heads, block_size, unit, budget = 8, 128, 1, 4096
    contexts = [int(torch.randint(5000, 300_000, (1,), generator=generator)) for _ in range(rows)]
    table = torch.randint(0, 1 << 20, (rows, 300_000 // block_size + 1), generator=generator, dtype=torch.int32).cuda()
    kv_cache = torch.empty(1, kv_heads, block_size, 1, device="cuda")
    seq_len = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    decode_rows = DecodeRows(torch.zeros(rows, kv_heads, 1, device="cuda"), kv_cache, table, seq_len, SCALE)
    starts = seq_len.cumsum(0) - seq_len
    # Logarithms of probabilities, many of them equal.
    values = -torch.rand(kv_heads, sum(contexts), device="cuda").mul(1 << 14).round() / 1000
    scores = RowScores(values, starts, sum(contexts), unit)
    knobs = torch.tensor([[budget, 16, 64]] * rows, dtype=torch.int32, device="cuda")
    expected, actual = (empty_lists(rows * kv_heads, budget) for _ in range(2))
    top_tokens_reference.top_tokens(scores, decode_rows, knobs, expected)
    cuda.top_tokens(scores, decode_rows, knobs, actual)
    assert bool((actual.kept_tokens == budget).all())
    assert torch.equal(actual.slots, expected.slots), f"seed {seed}"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize("unit", [1, 16])
def test_top_tokens_compiles_for_hopper(unit: int) -> None:
    from vllm_sparse.kernels.top_tokens import triton as top_tokens_triton

    compile_for_hopper(
        top_tokens_triton.top_tokens_kernel,
        {
            **dict.fromkeys(
                ("context_pointer", "knob_pointer", "block_table_pointer", "slot_pointer", "kept_pointer"), "*i32"
            ),
            **dict.fromkeys(("head_stride", "knob_row_stride", "table_row_stride", "width", "kv_heads"), "i32"),
            "score_pointer": "*fp32",
            "start_pointer": "*i64",
        },
        {"UNIT": unit, "CACHE_BLOCK": 128, "TILE": max(top_tokens_triton.TILE // unit, 1024)},
        num_warps=16,
    )


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_token_scores_compile_for_hopper() -> None:
    from vllm_sparse.kernels.token_scores import triton as token_scores_triton

    pointers = {
        **dict.fromkeys(("block_table_pointer", "context_pointer"), "*i32"),
        **dict.fromkeys(("product_pointer", "partial_pointer"), "*fp32"),
        "start_pointer": "*i64",
    }
    strides = ("query_row_stride", "query_head_stride", "cache_block_stride", "cache_head_stride", "cache_token_stride")
    types = {
        **pointers,
        **dict.fromkeys((*strides, "table_row_stride", "capacity", "kv_heads"), "i32"),
        "scale": "fp32",
    }
    constants = {"SPLITS": 64, "GROUP": 4, "GROUP_TILE": 16, "HEAD_SIZE": 128, "HEAD_TILE": 128, "CACHE_BLOCK": 128}
    compile_for_hopper(
        token_scores_triton.products_kernel,
        {**types, "query_pointer": "*bf16", "cache_pointer": "*bf16"},
        {**constants, "TILE": token_scores_triton.KEY_TILE},
    )
    compile_for_hopper(
        token_scores_triton.merge_kernel,
        types,
        {"SPLITS": 64, "GROUP": 4, "SUM": True, "TILE": token_scores_triton.SCORE_TILE},
    )
