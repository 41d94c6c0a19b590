"""A layer's cache as pages of one KV head each, which stock kernels on GPUs take as a cache with a single head."""

from __future__ import annotations

import torch


class HeadPages:
    """Views of caches, kept: making them costs more host time than launching a kernel, and a cache does not move."""

    def __init__(self) -> None:
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, kv_cache: torch.Tensor, page_size_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of one head each: two ``[pages, page_size, 1, head_size]`` views."""
        from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

        place = (kv_cache.data_ptr(), page_size_tokens)
        if place not in self._views:
            pages = kv_cache.view(-1, page_size_tokens, 1, kv_cache.shape[3])
            head_size = kv_cache.shape[3] // 2
            keys, values = pages[..., :head_size], pages[..., head_size:]
            self._views[place] = canonicalize_singleton_dim_strides(keys), canonicalize_singleton_dim_strides(values)
        return self._views[place]
