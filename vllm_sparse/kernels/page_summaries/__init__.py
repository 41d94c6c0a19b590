"""Summaries of each page's keys, which selection methods compare queries with."""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_sparse.kernels.page_summaries import reference
from vllm_sparse.kernels.page_summaries.reference import SummaryContent, SummaryKind, coded_keys
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.step.chunks import PromptChunks

__all__ = [
    "SummaryContent",
    "SummaryKind",
    "chunk_summaries",
    "coded_keys",
    "page_summaries",
    "read_summaries",
    "store_summaries",
]


def _implementation(keys: PagedKeys) -> ModuleType:
    if keys.kv_cache.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.page_summaries import triton

        return triton
    return reference


def page_summaries(keys: PagedKeys, kind: SummaryKind) -> torch.Tensor:
    """Summarise the live keys of each logical page; one pass over the keys.

    Prefill methods do so for every prompt chunk: at 128K tokens the pass reads 1 % of the bytes that the prompt chunk's
    attention reads, and no summary can become stale. A decode step cannot afford the pass, so it reads the summaries
    that `store_summaries` has stored.

    Runs in Triton on CUDA, else in PyTorch.

    Args:
        keys: the request's keys.
        kind: page size and what a summary holds.

    Returns:
        ``[kv_heads, ceil(context / page_tokens), kind.width(head_size)]``, codes in bytes, all others in float32; the
        last page may be short.
    """
    summaries: torch.Tensor = _implementation(keys).page_summaries(keys, kind)
    return summaries


def chunk_summaries(chunks: PromptChunks, kind: SummaryKind) -> torch.Tensor:
    """`page_summaries` of the requests of prompt chunks, of all in one launch on CUDA.

    Args:
        chunks: the prompt chunks.
        kind: page size and what a summary holds; no codes.

    Returns:
        float32 ``[kv_heads, chunks, pages of the longest context, kind.width(head_size)]``, anything past a context.
    """
    summaries: torch.Tensor = _implementation(chunks.keys[0]).chunk_summaries(chunks, kind)
    return summaries


def store_summaries(keys: PagedKeys, kind: SummaryKind, first_new_token: int) -> None:
    """Write the summaries of a step's new keys, and of those before them in the same block, into `keys.summaries`.

    Summaries are stored by physical block, as the cache is, so a request that shares a prefix finds them. A block with
    both new and older keys may be a copy that vLLM made of another request's block; so the whole block is summarised.

    Runs in Triton on CUDA, else in PyTorch.

    Args:
        keys: the request's keys, the new ones included, with `summaries` of this kind.
        kind: page size and what a summary holds; its pages divide the cache's blocks.
        first_new_token: position of the step's first new token.
    """
    _implementation(keys).store_summaries(keys, kind, first_new_token)


def read_summaries(keys: PagedKeys, kind: SummaryKind) -> torch.Tensor:
    """Summaries of all pages of a request: ``[kv_heads, ceil(context / page_tokens), width]``, in `kind.dtype`.

    These are the stored summaries, or if `keys.summaries` is None those that `store_summaries` would have stored.
    """
    if keys.summaries is None:
        return kind.stored(page_summaries(keys, kind), keys.kv_cache.dtype)
    blocks = keys.block_table[: -(-keys.seq_len // keys.block_size_tokens)].long()
    pages = -(-keys.seq_len // kind.page_tokens)
    return keys.summaries[blocks].transpose(0, 1).flatten(1, 2)[:, :pages]
