"""Mean key of each page, which selection methods compare queries with."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_means import reference
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["page_means"]


def page_means(keys: PagedKeys, page_tokens: int) -> torch.Tensor:
    """Mean of the live keys of each logical page; one pass over the keys.

    Computed from the cache at every chunk rather than kept beside it: at 128K tokens the pass reads 1 % of what the
    chunk's attention does, and nothing can go stale when blocks are shared, copied or loaded by a connector.

    Runs in Triton on CUDA, else in PyTorch.

    Args:
        keys: the request's keys.
        page_tokens: tokens of a page; a power of two.

    Returns:
        float32 ``[kv_heads, ceil(context / page_tokens), head_size]``; the last page may be short.
    """
    if keys.kv_cache.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.page_means import triton

        return triton.page_means(keys, page_tokens)
    return reference.page_means(keys, page_tokens)
