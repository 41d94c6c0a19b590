"""Mean key of each page, in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.keys import PagedKeys

# A multiple of every page size. Keys are read in tiles, so that a copy of a long cache is never held as a whole.
TILE_TOKENS = 8192


def page_means(keys: PagedKeys, page_tokens: int) -> torch.Tensor:
    """Mean of the live keys of each logical page; arguments as in the public function."""
    means: list[torch.Tensor] = []
    for start in range(0, keys.context_tokens, TILE_TOKENS):
        tile = keys.read(start, min(start + TILE_TOKENS, keys.context_tokens)).float()
        whole = tile.shape[1] // page_tokens * page_tokens
        if whole:
            means.append(tile[:, :whole].unflatten(1, (-1, page_tokens)).mean(2))  # type: ignore[no-untyped-call]
        if whole < tile.shape[1]:
            means.append(tile[:, whole:].mean(1, keepdim=True))
    return torch.cat(means, dim=1)
