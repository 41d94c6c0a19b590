"""Summaries of each page's keys, in PyTorch: the specification, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vllm_sparse.keys import PagedKeys
from vllm_sparse.step.chunks import PromptChunks

# A multiple of every page size. Keys are read in tiles, so that memory never holds a copy of a whole long cache.
TILE_TOKENS = 8192
# The largest number of 4 bits of exponent and 3 of mantissa.
LARGEST_FLOAT8 = 448.0
# Of a number of a key in 2 bits.
LARGEST_CODE = 3
LARGEST_FLOAT16 = 65504.0
SummaryContent = Literal["mean", "bounds", "float8_bounds", "codes"]


@dataclass(frozen=True)
class SummaryKind:
    """What a summary of a page's keys holds.

    Attributes:
        page_tokens: tokens of a page; a power of two.
        content: one of

            - ``mean``: the mean key, in the cache's numbers, but in bfloat16 beside an FP8 cache;
            - ``bounds``: the least numbers of each channel, then the largest ones, in the cache's numbers;
            - ``float8_bounds``: the same in 8-bit floats, rounded to the nearest and to `LARGEST_FLOAT8` at most;
            - ``codes``: every key in 2 bits a number, in steps of its channel from the page's least number to its
              largest. In bytes: the least numbers and the steps in float16, then `head_size` / 4 bytes a token, of
              which byte j holds channels j, j + head_size / 4, ... from its lowest bits on.
    """

    page_tokens: int
    content: SummaryContent

    @property
    def has_bounds(self) -> bool:
        """A summary is the least and the largest number of each channel."""
        return self.content in ("bounds", "float8_bounds")

    def width(self, head_size: int) -> int:
        """Number of values in a summary."""
        if self.content == "codes":
            return 4 * head_size + self.page_tokens * (head_size // 4)
        return head_size * (2 if self.has_bounds else 1)

    def dtype(self, cache_dtype: torch.dtype) -> torch.dtype:
        """Of stored summaries beside a cache of this dtype."""
        if self.content == "codes":
            return torch.uint8
        if self.content == "float8_bounds":
            return torch.float8_e4m3fn
        return torch.bfloat16 if self.content == "mean" and cache_dtype.itemsize == 1 else cache_dtype

    def bytes_per_token(self, head_size: int, number_bytes: int) -> float:
        """Of a KV head, beside a cache whose numbers have so many bytes."""
        in_bytes = self.content in ("float8_bounds", "codes")
        if self.content == "mean":
            number_bytes = max(number_bytes, 2)
        return self.width(head_size) * (1 if in_bytes else number_bytes) / self.page_tokens

    def stored(self, summaries: torch.Tensor, cache_dtype: torch.dtype) -> torch.Tensor:
        """Summaries as they are stored beside a cache of this dtype."""
        if self.content == "float8_bounds":
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


def chunk_summaries(chunks: PromptChunks, kind: SummaryKind) -> torch.Tensor:
    """Summaries of the pages of several requests, 0 past a context; arguments as in the public function."""
    each = [page_summaries(keys, kind) for keys in chunks.keys]
    pages = max(summaries.shape[1] for summaries in each)
    padded = [torch.nn.functional.pad(summaries, (0, 0, 0, pages - summaries.shape[1])) for summaries in each]
    return torch.stack(padded, dim=1)


def _summary(pages: torch.Tensor, kind: SummaryKind) -> torch.Tensor:
    """Summaries ``[kv_heads, pages, width]`` of float32 keys ``[kv_heads, pages, tokens, head_size]``."""
    if kind.content == "codes":
        return _codes(pages, kind)
    return torch.cat((pages.amin(2), pages.amax(2)), dim=2) if kind.has_bounds else pages.mean(2)


def _codes(pages: torch.Tensor, kind: SummaryKind) -> torch.Tensor:
    """Codes of pages as `SummaryKind.content` lays them out; arguments as of `_summary`."""
    heads, count, tokens, head_size = pages.shape
    least = pages.amin(2).clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half()
    step = ((pages.amax(2) - least.float()) / LARGEST_CODE).clamp(max=LARGEST_FLOAT16).half()
    # A channel whose numbers are all equal has steps of 0, and codes of 0.
    inverse = torch.where(step > 0, 1 / step.float(), 0.0).unsqueeze(2)
    code = ((pages - least.float().unsqueeze(2)) * inverse + 0.5).floor().clamp(0, LARGEST_CODE)
    quarters = code.to(torch.uint8).view(heads, count, tokens, 4, head_size // 4)
    packed = quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6
    summary = packed.new_zeros(heads, count, kind.width(head_size))
    summary[..., : 4 * head_size] = torch.cat((least, step), dim=2).view(torch.uint8)
    summary[..., 4 * head_size : 4 * head_size + tokens * (head_size // 4)] = packed.flatten(2)
    return summary


def coded_keys(summaries: torch.Tensor, head_size: int) -> torch.Tensor:
    """What codes say of the keys of pages.

    Args:
        summaries: uint8 ``[kv_heads, pages, width]`` as `SummaryKind.content` lays them out.
        head_size: of the keys.

    Returns:
        float32 ``[kv_heads, pages * page_tokens, head_size]``, of a short last page's missing tokens anything.
    """
    numbers = summaries[..., : 4 * head_size].contiguous().view(torch.float16).float().unsqueeze(2)
    packed = summaries[..., 4 * head_size :].unflatten(2, (-1, head_size // 4))  # type: ignore[no-untyped-call]
    code = torch.cat([packed >> 2 * quarter & LARGEST_CODE for quarter in range(4)], dim=3)
    keys: torch.Tensor = (numbers[..., :head_size] + numbers[..., head_size:] * code.float()).flatten(1, 2)
    return keys


def store_summaries(keys: PagedKeys, kind: SummaryKind, first_new_token: int) -> None:
    """Store the summaries of a step's new keys; arguments as in the public function."""
    assert keys.summaries is not None
    start = first_new_token // keys.block_size_tokens * keys.block_size_tokens
    summaries = page_summaries(keys, kind, start)
    pages_per_block = keys.block_size_tokens // kind.page_tokens
    page = torch.arange(summaries.shape[1], device=summaries.device) + start // kind.page_tokens
    block = keys.block_table[page // pages_per_block].long()
    keys.summaries[block, :, page % pages_per_block] = kind.stored(summaries.transpose(0, 1), keys.kv_cache.dtype)
