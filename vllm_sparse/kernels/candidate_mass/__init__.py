"""Attention of a sample of each query block's queries to listed candidate pages: the second stage of a selection."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.candidate_mass import reference
from vllm_sparse.kernels.candidate_mass.reference import NOT_LISTED, SAMPLED_QUERIES, SCRATCH_BYTES
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import PromptChunks

__all__ = ["NOT_LISTED", "SAMPLED_QUERIES", "candidate_mass", "chunk_mass", "scratch_bytes"]


def scratch_bytes(blocks: int, pages: int, query_heads: int, kv_heads: int) -> int:
    """Memory that `chunk_mass` takes on a GPU beside its result.

    Args:
        blocks: query blocks of the prompt chunks.
        pages: of the longest context.
        query_heads: of this process.
        kv_heads: of this process.
    """
    of_a_block = 4 * reference.kept_masses(pages, query_heads, kv_heads)
    return min(blocks * of_a_block, max(SCRATCH_BYTES, of_a_block))


def candidate_mass(
    query: torch.Tensor, keys: PagedKeys, scale: float, query_block_tokens: int, candidates: PageList
) -> torch.Tensor:
    """Attention mass of candidate pages: softmax probabilities, summed over sampled queries.

    `SAMPLED_QUERIES` evenly spread queries stand for their query block, and the largest product of each of a page's
    `reference.KEY_GROUPS` groups of keys for the group. Attention is causal and to the listed pages only. So the work
    is the listed share of the key products that dense attention takes, times `SAMPLED_QUERIES` over
    `query_block_tokens`. The query heads of a KV head share a list, so that a key is read once for all of them.

    Runs in Triton on CUDA, else in PyTorch; without a device-to-host sync.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of a prompt chunk, at the last positions of the context.
        keys: the request's keys, the chunk's included.
        scale: softmax scale of the model; positive.
        query_block_tokens: query tokens of a query block; a power of two of at least 16.
        candidates: lists of ``list_heads * query_blocks`` rows, head-major, each with the pages of its own positions;
            `list_heads` divides the KV heads, and consecutive KV heads share a list. Pages are a power of two of 8
            to 64 tokens.

    Returns:
        float32 ``[query_heads, ceil(query_tokens / query_block_tokens), ceil(context / page_tokens)]``; `NOT_LISTED`
        for pages that are not candidates. Those of the others add up to `SAMPLED_QUERIES`.
    """
    if query.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.candidate_mass import triton

        return triton.candidate_mass(query, keys, scale, query_block_tokens, candidates)
    return reference.candidate_mass(query, keys, scale, query_block_tokens, candidates)


def chunk_mass(chunks: PromptChunks, candidates: PageList) -> torch.Tensor:
    """`candidate_mass` of prompt chunks, of all in one launch on CUDA.

    Args:
        chunks: the prompt chunks; query blocks of at least 16 tokens.
        candidates: as in `candidate_mass`, rows in the order of `PromptBlocks`.

    Returns:
        float32 ``[query_heads, blocks, pages of the longest context]``; `NOT_LISTED` for pages that are not candidates.
    """
    if chunks.query.is_cuda and isinstance(chunks.keys[0], PlainKeys):
        from vllm_sparse.kernels.candidate_mass import triton

        return triton.chunk_mass(chunks, candidates)
    return reference.chunk_mass(chunks, candidates)
