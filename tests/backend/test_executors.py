"""Each stock kernel of the table reads lists as a softmax in float64 does.

On Hopper all but FlashAttention 4 are tried by forcing them. Without a GPU vLLM's Triton attention is interpreted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests import oracle
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.backend.executors.float8 import ValueScale
from vllm_sparse.backend.executors.lists import list_executor
from vllm_sparse.backend.executors.rule import FLASH_ATTENTION, TRITON, StockKernels
from vllm_sparse.step.launch import Launch

KV_HEADS, BLOCK_TOKENS, HEAD_SIZE = 2, 128, 64
LONGEST, BLOCKS = (4096, 40) if DEVICE == "cuda" else (256, 5)
SCALE = 0.1
FLASH3 = pytest.param(FLASH_ATTENTION[3], marks=oracle.needs_cuda, id="flash3")
FLASH2 = pytest.param(FLASH_ATTENTION[2], marks=oracle.needs_cuda, id="flash2")
ANY_DEVICE = pytest.param(TRITON, marks=needs_triton, id="triton")
ROWS = [pytest.param(6, 1, id="few-rows"), pytest.param(130, 1, id="many-rows"), pytest.param(3, 128, id="chunks")]


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=19)


@pytest.fixture(autouse=True)
def vllm_with_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's Triton kernels, which vLLM leaves out where Triton has no device to run on."""
    if not (CAN_RUN and DEVICE == "cpu"):
        yield
        return
    import triton
    import triton.language as tl
    from vllm import triton_utils

    def kernels() -> list[str]:
        return [name for name in sys.modules if name.startswith("vllm.v1.attention.ops.triton_")]

    monkeypatch.setattr(triton_utils, "triton", triton)
    monkeypatch.setattr(triton_utils, "tl", tl)
    for name in kernels():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in kernels():
        del sys.modules[name]


def expected(
    launch: Launch, query: torch.Tensor, cache: torch.Tensor, value_scale: float = 1.0, soft_cap: float = 0.0
) -> torch.Tensor:
    """Softmax in float64 over each row's list, its own positions last; NaN for rows without keys."""
    out = torch.full(query.shape, float("nan"), dtype=torch.float64)
    pages = cache.double().cpu().view(-1, launch.page_size_tokens, cache.shape[3])
    kept = launch.kept_tokens.tolist()
    for row, (first, stop) in enumerate(pairwise(launch.query_starts.tolist())):
        if not kept[row]:
            continue
        numbers = pages[launch.pages[row].long().cpu()].flatten(0, 1)[: kept[row]]
        keys, values = numbers.chunk(2, dim=1)
        logits = torch.einsum("qhd,kd->qhk", query[first:stop].double().cpu(), keys) * SCALE
        if soft_cap:
            logits = soft_cap * (logits / soft_cap).tanh()
        position = kept[row] - (stop - first) + torch.arange(stop - first)
        logits.masked_fill_(torch.arange(kept[row]) > position[:, None, None], float("-inf"))
        out[first:stop] = torch.einsum("qhk,kd->qhd", logits.softmax(2), values * value_scale)
    return out


def random_launch(generator: torch.Generator, rows: int, query_tokens: int, page_size: int) -> Launch:
    """Rows of random lists, of a width that no tile divides; decoding, the first row is empty."""
    count = BLOCKS * KV_HEADS * BLOCK_TOKENS // page_size
    width = LONGEST // page_size - (3 if page_size < 32 else 0)
    pages = torch.stack([torch.randperm(count, generator=generator)[:width] for _ in range(rows)]).int()
    kept = torch.randint(query_tokens, width * page_size + 1, (rows,), generator=generator).int()
    if query_tokens == 1:
        kept[0] = 0
    starts = torch.arange(rows + 1).int() * query_tokens
    return Launch(starts.to(DEVICE), query_tokens, pages.to(DEVICE), kept.to(DEVICE), page_size)


def numbers(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Any:
    """Normal numbers."""
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("page_size", [1, 8, 16, 128])
@pytest.mark.parametrize(("rows", "query_tokens"), ROWS)
@pytest.mark.parametrize("kernels", [FLASH3, FLASH2, ANY_DEVICE])
def test_lists_are_read(
    kernels: StockKernels, rows: int, query_tokens: int, page_size: int, generator: torch.Generator
) -> None:
    launch = random_launch(generator, rows, query_tokens, page_size)
    # The interpreter multiplies no bfloat16.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    cache = numbers(generator, dtype, BLOCKS, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE)
    query = numbers(generator, dtype, rows * query_tokens, 4, HEAD_SIZE)
    output = torch.empty_like(query)
    list_executor(kernels).run(launch, query, output, cache, SCALE)
    truth = expected(launch, query, cache)
    live = ~truth.isnan()
    assert oracle.relative_error(output.cpu()[live], truth[live]) < 0.01


@pytest.mark.parametrize("page_size", [1, 128])
@pytest.mark.parametrize(("rows", "query_tokens"), ROWS)
@pytest.mark.parametrize("kernels", [FLASH3, ANY_DEVICE])
def test_an_fp8_cache_is_read(
    kernels: StockKernels, rows: int, query_tokens: int, page_size: int, generator: torch.Generator
) -> None:
    """Scales of queries and keys come in the softmax scale, that of values in the executor."""
    launch = random_launch(generator, rows, query_tokens, page_size)
    cache = numbers(generator, torch.float8_e4m3fn, BLOCKS, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE)
    query = numbers(generator, torch.float8_e4m3fn, rows * query_tokens, 4, HEAD_SIZE).bfloat16()
    output = torch.empty_like(query)
    list_executor(kernels, ValueScale(torch.tensor(0.25).to(DEVICE))).run(launch, query, output, cache, SCALE)
    truth = expected(launch, query, cache, 0.25)
    live = ~truth.isnan()
    # Probabilities are rounded to FP8 too; the interpreter cuts them off.
    assert oracle.relative_error(output.cpu()[live], truth[live]) < (0.05 if DEVICE == "cuda" else 0.1)


@pytest.mark.parametrize("kernels", [FLASH3, FLASH2, ANY_DEVICE])
def test_logits_are_capped(kernels: StockKernels, generator: torch.Generator) -> None:
    launch = random_launch(generator, 3, 1, 16)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    cache = 3 * numbers(generator, dtype, BLOCKS, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE)
    query = numbers(generator, dtype, 3, 4, HEAD_SIZE)
    output = torch.empty_like(query)
    list_executor(kernels, soft_cap=1.5).run(launch, query, output, cache, SCALE)
    live = ~expected(launch, query, cache).isnan()
    truth, uncapped = expected(launch, query, cache, soft_cap=1.5)[live], expected(launch, query, cache)[live]
    assert oracle.relative_error(output.cpu()[live], truth) < 0.01
    assert oracle.relative_error(truth, uncapped) > 0.1
