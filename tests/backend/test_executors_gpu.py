"""Each stock kernel of the table reads lists as a softmax in float64 does, on a GPU.

On Hopper all but FlashAttention 4 are tried by forcing them; other GPUs have some of them.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests import oracle
from vllm_sparse.backend.executors.float8 import ValueScale
from vllm_sparse.backend.executors.lists import list_executor
from vllm_sparse.backend.executors.rule import FLASH_ATTENTION, TRITON
from vllm_sparse.step.launch import Launch

pytestmark = oracle.needs_cuda

BLOCKS, KV_HEADS, BLOCK_TOKENS, HEAD_SIZE = 40, 2, 128, 128
KERNELS = {"flash3": FLASH_ATTENTION[3], "flash2": FLASH_ATTENTION[2], "triton": TRITON}
SCALE = 0.1


def expected(launch: Launch, query: torch.Tensor, cache: torch.Tensor, value_scale: float = 1.0) -> torch.Tensor:
    """Softmax in float64 over each row's list, its own positions last; rows without keys are NaN."""
    out = torch.full(query.shape, float("nan"), dtype=torch.float64)
    pages = cache.double().cpu().view(-1, launch.page_size_tokens, cache.shape[3])
    starts, kept = launch.query_starts.tolist(), launch.kept_tokens.tolist()
    for row, (first, stop) in enumerate(pairwise(starts)):
        if not kept[row]:
            continue
        numbers = pages[launch.pages[row].long().cpu()].flatten(0, 1)[: kept[row]]
        keys, values = numbers.split(cache.shape[3] // 2, dim=1)
        logits = torch.einsum("qhd,kd->qhk", query[first:stop].double().cpu(), keys) * SCALE
        position = kept[row] - (stop - first) + torch.arange(stop - first)
        logits.masked_fill_(torch.arange(kept[row]) > position[:, None, None], float("-inf"))
        out[first:stop] = torch.einsum("qhk,kd->qhd", logits.softmax(2), values * value_scale)
    return out


def random_launch(generator: torch.Generator, rows: int, query_tokens: int, page_size: int) -> Launch:
    """Rows of random lists, the first of them empty in decoding."""
    count = BLOCKS * KV_HEADS * BLOCK_TOKENS // page_size
    width = min(4096 // page_size, count) - 3
    pages = torch.stack([torch.randperm(count, generator=generator)[:width] for _ in range(rows)]).int()
    kept = torch.randint(query_tokens, width * page_size + 1, (rows,), generator=generator).int()
    if query_tokens == 1:
        kept[0] = 0
    starts = torch.arange(rows + 1).int() * query_tokens
    return Launch(starts.cuda(), query_tokens, pages.cuda(), kept.cuda(), page_size)


@pytest.mark.parametrize("page_size", [1, 8, 16, 128])
@pytest.mark.parametrize(("rows", "query_tokens"), [(6, 1), (130, 1), (5, 128)])
@pytest.mark.parametrize("name", KERNELS)
def test_lists_are_read(name: str, rows: int, query_tokens: int, page_size: int, generator: torch.Generator) -> None:
    launch = random_launch(generator, rows, query_tokens, page_size)
    cache = torch.randn(BLOCKS, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE, generator=generator).bfloat16().cuda()
    query = torch.randn(rows * query_tokens, 4, HEAD_SIZE, generator=generator).bfloat16().cuda()
    output = torch.empty_like(query)
    list_executor(KERNELS[name]).run(launch, query, output, cache, SCALE)
    truth = expected(launch, query, cache)
    live = ~truth.isnan()
    assert oracle.relative_error(output.cpu()[live], truth[live]) < 0.01


@pytest.mark.parametrize("page_size", [1, 128])
@pytest.mark.parametrize(("rows", "query_tokens"), [(6, 1), (130, 1), (5, 128)])
@pytest.mark.parametrize("name", ["flash3", "triton"])
def test_an_fp8_cache_is_read(
    name: str, rows: int, query_tokens: int, page_size: int, generator: torch.Generator
) -> None:
    """Scales of queries and keys come in the softmax scale, that of values in the executor."""
    launch = random_launch(generator, rows, query_tokens, page_size)
    shape = BLOCKS, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE
    cache = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn).cuda()
    query = torch.randn(rows * query_tokens, 4, HEAD_SIZE, generator=generator).to(torch.float8_e4m3fn).bfloat16()
    query = query.cuda()
    output = torch.empty_like(query)
    list_executor(KERNELS[name], ValueScale(torch.tensor(0.25).cuda())).run(launch, query, output, cache, SCALE)
    truth = expected(launch, query, cache, 0.25)
    live = ~truth.isnan()
    # Probabilities are rounded to FP8 too.
    assert oracle.relative_error(output.cpu()[live], truth[live]) < 0.05
