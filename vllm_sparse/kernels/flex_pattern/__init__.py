"""FlexPrefill's pattern switch and pooled map: attention that mean queries give to mean keys, a cheap guess."""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_sparse.kernels.flex_pattern import reference
from vllm_sparse.step.chunks import PromptBlocks

__all__ = ["pooled_attention", "pooled_distance"]


def _implementation(scores: torch.Tensor) -> ModuleType:
    if scores.is_cuda:
        from vllm_sparse.kernels.flex_pattern import triton

        return triton
    return reference


def pooled_distance(
    scores: torch.Tensor,
    column_mass: torch.Tensor,
    samples: PromptBlocks,
    key_block_tokens: int,
    scale: float,
    guard_zeros: bool,
) -> torch.Tensor:
    """Jensen-Shannon distance between pooled and sampled attention over key blocks.

    FlexPrefill, arXiv 2502.20766, section 3.2. Runs in Triton on CUDA, for all prompt chunks in one launch, else in
    PyTorch.

    Args:
        scores: float32 ``[heads, chunks, key_blocks]``, of the sampled queries as `chunk_page_scores` gives them.
        column_mass: float32, the shape of `scores`: sampled mass per key block; those of a context sum to 1.
        samples: the sampled queries, one query block a chunk.
        key_block_tokens: tokens of a key block.
        scale: softmax scale of the model.
        guard_zeros: take ``0 * log 0`` as 0; else such a head's distance is infinite, as in the official code.

    Returns:
        float32 ``[heads, chunks]``, 0 to sqrt(ln 2).
    """
    distance: torch.Tensor = _implementation(scores).pooled_distance(
        scores, column_mass, samples, key_block_tokens, scale, guard_zeros
    )
    return distance


def pooled_attention(scores: torch.Tensor, blocks: PromptBlocks, key_block_tokens: int, scale: float) -> torch.Tensor:
    """Attention of each query block's mean query to the mean keys in its reach, over the chunk's query blocks.

    FlexPrefill, arXiv 2502.20766, section 3.3. Runs in Triton on CUDA, for all prompt chunks in one launch, else in
    PyTorch.

    Args:
        scores: float32 ``[heads, blocks, key_blocks]`` as `chunk_page_scores` gives them.
        blocks: query blocks of the chunks.
        key_block_tokens: tokens of a key block.
        scale: softmax scale of the model.

    Returns:
        float32, the shape of `scores`: those of a chunk sum to 1. 0 for key blocks out of reach.
    """
    attention: torch.Tensor = _implementation(scores).pooled_attention(scores, blocks, key_block_tokens, scale)
    return attention
