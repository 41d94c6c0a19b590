"""Inputs of the tests of SALE's selection."""

from __future__ import annotations

import random
from types import ModuleType

import torch

from tests.kernels.chunks import SPANS, STEP_TOKENS, some_chunks
from tests.kernels.interpreter import DEVICE
from vllm_sparse.kernels.low_bit_scores import LowBitScoring, middle_pages
from vllm_sparse.kernels.low_bit_scores.tables import MiddlePages
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks, chunk_alone

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


def alone(
    query: torch.Tensor, keys: PlainKeys, scale: float, scoring: LowBitScoring
) -> tuple[PromptChunks, MiddlePages]:
    """One prompt chunk and its tables."""
    chunk = chunk_alone(query, keys, scale, scoring.query_block_tokens)
    return chunk, middle_pages(chunk.blocks, scoring)


def several(
    heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, scoring: LowBitScoring
) -> tuple[int, PromptChunks, MiddlePages]:
    """A seed, prompt chunks on scattered blocks, two of which have no page in the middle, and their tables."""
    seed, _, keys = request(1, 16 * 500, heads, kv_heads, head_size, 16, dtype)
    rows = max(span.row for span in SPANS) + 1
    generator = torch.Generator().manual_seed(seed)
    width = -(-max(span.seq_len for span in SPANS) // 16)
    table = torch.randint(keys.kv_cache.shape[0] - 3, (rows, width), generator=generator).int().to(DEVICE)
    query = torch.randn(STEP_TOKENS, heads + 1, head_size, generator=generator).mul_(2).to(dtype).to(DEVICE)[:, 1:]
    of_chunks = tuple(PlainKeys(keys.kv_cache, table[span.row], span.seq_len) for span in SPANS)
    blocks = some_chunks(scoring.query_block_tokens, DEVICE)
    chunks = PromptChunks(blocks, query, of_chunks, table, head_size**-0.5)
    return seed, chunks, middle_pages(blocks, scoring)


def assert_chunks_keep_what_each_keeps_alone(
    implementation: ModuleType, chunks: PromptChunks, middle: MiddlePages, scoring: LowBitScoring, seed: int
) -> None:
    """Bit for bit, in each context."""
    log_tau = torch.linspace(-0.5, 2.0, chunks.query.shape[1], device=DEVICE)
    together, blocks = implementation.kept_maps(chunks, middle, log_tau, scoring), chunks.blocks
    for chunk, keys in enumerate(chunks.keys):
        query = chunks.query_of(chunk)
        assert isinstance(keys, PlainKeys)
        of_chunk, own = alone(query, keys, chunks.scale, scoring)
        if own.starts[-1]:
            wanted = implementation.kept_maps(of_chunk, own, log_tau, scoring)
        else:
            shape = query.shape[1], of_chunk.blocks.blocks, -(-keys.seq_len // PAGE)
            wanted = torch.ones(shape, dtype=torch.bool, device=DEVICE)
        rows = slice(blocks.starts[chunk], blocks.starts[chunk + 1])
        assert torch.equal(together[:, rows, : wanted.shape[2]], wanted), f"chunk {chunk}, seed {seed}"
        share = float(wanted.float().mean())
        assert (share < 1) == (own.starts[-1] > 0), f"a test of nothing: {share}, seed {seed}"
