"""Mean, minimum and maximum key of each page, in PyTorch: the specification, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.keys import PagedKeys

# A multiple of every page size. Keys are read in tiles, so that a copy of a long cache is never held as a whole.
TILE_TOKENS = 8192


@dataclass(frozen=True)
class PageSummaries:
    """What is known of the live keys of each page, float32 ``[kv_heads, pages, head_size]`` each.

    Attributes:
        mean: mean key.
        minimum: least value of each channel.
        maximum: largest value of each channel.
    """

    mean: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor


def page_summaries(keys: PagedKeys, page_tokens: int) -> PageSummaries:
    """Summarise the live keys of each logical page; arguments as in the public function."""
    parts: list[PageSummaries] = []
    for start in range(0, keys.context_tokens, TILE_TOKENS):
        tile = keys.read(start, min(start + TILE_TOKENS, keys.context_tokens)).float()
        whole = tile.shape[1] // page_tokens * page_tokens
        pieces = [tile[:, :whole].unflatten(1, (-1, page_tokens))] if whole else []  # type: ignore[no-untyped-call]
        if whole < tile.shape[1]:
            pieces.append(tile[:, whole:].unsqueeze(1))
        parts += [PageSummaries(pages.mean(2), pages.amin(2), pages.amax(2)) for pages in pieces]
    return PageSummaries(
        torch.cat([part.mean for part in parts], dim=1),
        torch.cat([part.minimum for part in parts], dim=1),
        torch.cat([part.maximum for part in parts], dim=1),
    )
