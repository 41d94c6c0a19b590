"""Attention of a sample of each query block's queries to all pages of the context."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.sampled_mass import reference
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.step.chunks import PromptChunks

__all__ = ["chunk_sampled_mass", "sampled_mass", "scratch_bytes"]


def scratch_bytes(blocks: int, pages: int, page_tokens: int, query_heads: int, kv_heads: int) -> int:
    """Memory that `chunk_sampled_mass` takes on a GPU beside its result.

    Args:
        blocks: query blocks of the prompt chunks.
        pages: of the longest context.
        page_tokens: tokens of a page.
        query_heads: of this process.
        kv_heads: of this process.
    """
    return reference.scratch_bytes(blocks, pages, page_tokens, query_heads, kv_heads)


def sampled_mass(
    query: torch.Tensor, keys: PagedKeys, scale: float, query_block_tokens: int, page_tokens: int
) -> torch.Tensor:
    """Attention mass of each page: softmax probabilities, summed over sampled queries.

    `SAMPLED_QUERIES` of `vllm_sparse.kernels.candidate_mass`, evenly spread, stand for their query block, and the
    largest product of each of a page's groups of keys for the group. Attention is causal. So the work is that of the
    key products of dense attention, times `SAMPLED_QUERIES` over `query_block_tokens`. It equals `candidate_mass` with
    all pages listed, whose lists need no choice here.

    Runs in Triton on CUDA, else in PyTorch; without a device-to-host sync.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of a prompt chunk, at the last positions of the context.
        keys: the request's keys, the chunk's included.
        scale: softmax scale of the model; positive.
        query_block_tokens: query tokens of a query block; a power of two of at least 16.
        page_tokens: tokens of a page; a power of two of 8 to 64.

    Returns:
        float32 ``[query_heads, ceil(query_tokens / query_block_tokens), ceil(context / page_tokens)]``; 0 for pages of
        a query block's future. Those of a query block add up to `SAMPLED_QUERIES`.
    """
    if query.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.sampled_mass import triton

        return triton.sampled_mass(query, keys, scale, query_block_tokens, page_tokens)
    return reference.sampled_mass(query, keys, scale, query_block_tokens, page_tokens)


def chunk_sampled_mass(chunks: PromptChunks, page_tokens: int) -> torch.Tensor:
    """`sampled_mass` of prompt chunks, of all in one launch on CUDA.

    Args:
        chunks: the prompt chunks; query blocks of at least 16 tokens.
        page_tokens: as in `sampled_mass`.

    Returns:
        float32 ``[query_heads, blocks, pages of the longest context]``; 0 for pages of a query block's future and past
        its chunk's context.
    """
    if chunks.query.is_cuda and isinstance(chunks.keys[0], PlainKeys):
        from vllm_sparse.kernels.sampled_mass import triton

        return triton.chunk_sampled_mass(chunks, page_tokens)
    return reference.chunk_sampled_mass(chunks, page_tokens)
