"""Attention of sampled queries to all pages in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.candidate_mass.reference import SAMPLED_QUERIES, SCRATCH_BYTES, page_masses
from vllm_sparse.keys import PagedKeys
from vllm_sparse.step.chunks import PromptChunks

# Of a program of the kernel at most: sampled queries of a few query blocks and of query heads of a KV head.
MOST_ROWS = 128
# Keys that it multiplies them with at once.
KEY_TILE = 64
# Of a row, a page's mass and a tile's largest product.
MASS_BYTES, MOST_BYTES = 2, 4


def programs(query_heads: int, kv_heads: int, rows: int = MOST_ROWS) -> tuple[int, int, int]:
    """Query heads of a program of so many rows, its query blocks, and the programs of a KV head's query heads."""
    group = query_heads // kv_heads
    at_once = min(1 << (group - 1).bit_length(), rows // SAMPLED_QUERIES)
    return at_once, rows // (at_once * SAMPLED_QUERIES), -(-group // at_once)


def kept_bytes(pages: int, tiles: int) -> int:
    """What the kernel keeps of a row."""
    return MASS_BYTES * pages + MOST_BYTES * tiles


def scratch_bytes(blocks: int, pages: int, page_tokens: int, query_heads: int, kv_heads: int) -> int:
    """Memory that the kernel takes beside its result; arguments as in the public function."""
    _, together, splits = programs(query_heads, kv_heads)
    tiles = -(-pages // (KEY_TILE // page_tokens))
    of_a_group = kv_heads * splits * MOST_ROWS * kept_bytes(pages, tiles)
    return min(-(-blocks // together) * of_a_group, max(SCRATCH_BYTES, of_a_group))


def sampled_mass(
    query: torch.Tensor, keys: PagedKeys, scale: float, query_block_tokens: int, page_tokens: int
) -> torch.Tensor:
    """Mass of each page; arguments as in the public function, float64 if the queries are, else float32."""
    return page_masses(query, keys, scale, query_block_tokens, page_tokens)


def chunk_sampled_mass(chunks: PromptChunks, page_tokens: int) -> torch.Tensor:
    """Mass of the pages of prompt chunks; arguments as in the public function."""
    longest = -(-chunks.blocks.longest_seq_len // page_tokens)
    each = []
    for chunk, keys in enumerate(chunks.keys):
        mass = sampled_mass(chunks.query_of(chunk), keys, chunks.scale, chunks.blocks.query_block_tokens, page_tokens)
        each.append(torch.nn.functional.pad(mass, (0, longest - mass.shape[2])))
    return torch.cat(each, dim=1)
