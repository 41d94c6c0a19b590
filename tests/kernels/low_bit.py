"""Inputs of the tests of SALE's selection."""

from __future__ import annotations

import random

import torch

from tests.kernels.interpreter import DEVICE
from vllm_sparse.keys import PlainKeys

PAGE = 32
# Of float32: scores of other orders of summation, and integers that flip where a quotient is near a half.
SLACK = 0.02


def request(
    query_tokens: int, context: int, heads: int, kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype
) -> tuple[int, torch.Tensor, PlainKeys]:
    """A seed, queries in a wider row as a fused projection leaves them, and keys of many sizes on scattered blocks."""
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-context // block_size)
    cache = torch.randn(blocks + 3, kv_heads, block_size, 2 * head_size, generator=generator)
    cache *= 1.5 * torch.rand(blocks + 3, 1, block_size, 1, generator=generator)
    block_table = torch.randperm(blocks + 3, generator=generator)[:blocks].int()
    # What lies behind the context is stale and may be anything.
    stale = blocks * block_size - context
    if stale:
        cache[int(block_table[-1]), :, block_size - stale :] = float("nan")
    query = torch.randn(query_tokens, heads + 1, head_size, generator=generator).mul_(2).to(dtype).to(DEVICE)[:, 1:]
    return seed, query, PlainKeys(cache.to(dtype).to(DEVICE), block_table.to(DEVICE), context)
