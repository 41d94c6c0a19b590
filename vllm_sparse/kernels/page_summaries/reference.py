"""Summaries of each page's keys, in PyTorch: the specification, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.keys import PagedKeys

# A multiple of every page size. Keys are read in tiles, so that memory never holds a copy of a whole long cache.
TILE_TOKENS = 8192
# The largest number of 4 bits of exponent and 3 of mantissa.
LARGEST_FLOAT8 = 448.0


@dataclass(frozen=True)
class SummaryKind:
    """What a summary of a page's keys holds.

    Attributes:
        page_tokens: tokens of a page; a power of two.
        bounds: True for the least numbers of each channel, then the largest ones; False for the mean key.
        float8: stored in 8-bit floats, rounded to the nearest and to `LARGEST_FLOAT8` at most, instead of the cache's
            numbers.
    """

    page_tokens: int
    bounds: bool
    float8: bool = False

    def width(self, head_size: int) -> int:
        """Number of values in a summary."""
        return head_size * (2 if self.bounds else 1)

    def dtype(self, cache_dtype: torch.dtype) -> torch.dtype:
        """Of stored summaries beside a cache of this dtype."""
        return torch.float8_e4m3fn if self.float8 else cache_dtype

    def stored(self, summaries: torch.Tensor, cache_dtype: torch.dtype) -> torch.Tensor:
        """Summaries as they are stored beside a cache of this dtype."""
        if self.float8:
            summaries = summaries.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8)
        return summaries.to(self.dtype(cache_dtype))


def page_summaries(keys: PagedKeys, kind: SummaryKind, first_token: int = 0) -> torch.Tensor:
    """Summarise the pages from `first_token` on, which begins one; arguments as in the public function."""
    summaries: list[torch.Tensor] = []
    for start in range(first_token, keys.seq_len, TILE_TOKENS):
        tile = keys.read(start, min(start + TILE_TOKENS, keys.seq_len)).float()
        whole = tile.shape[1] // kind.page_tokens * kind.page_tokens
        if whole:
            summaries.append(_summary(tile[:, :whole].unflatten(1, (-1, kind.page_tokens)), kind))  # type: ignore[no-untyped-call]
        if whole < tile.shape[1]:
            summaries.append(_summary(tile[:, None, whole:], kind))
    return torch.cat(summaries, dim=1)


def _summary(pages: torch.Tensor, kind: SummaryKind) -> torch.Tensor:
    """Summaries ``[kv_heads, pages, width]`` of float32 keys ``[kv_heads, pages, tokens, head_size]``."""
    return torch.cat((pages.amin(2), pages.amax(2)), dim=2) if kind.bounds else pages.mean(2)


def store_summaries(keys: PagedKeys, kind: SummaryKind, first_new_token: int) -> None:
    """Store the summaries of a step's new keys; arguments as in the public function."""
    assert keys.summaries is not None
    start = first_new_token // keys.block_size_tokens * keys.block_size_tokens
    summaries = page_summaries(keys, kind, start)
    pages_per_block = keys.block_size_tokens // kind.page_tokens
    page = torch.arange(summaries.shape[1], device=summaries.device) + start // kind.page_tokens
    block = keys.block_table[page // pages_per_block].long()
    keys.summaries[block, :, page % pages_per_block] = kind.stored(summaries.transpose(0, 1), keys.kv_cache.dtype)
