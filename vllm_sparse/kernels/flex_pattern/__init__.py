"""FlexPrefill's pattern switch: the distance of pooled attention, a cheap guess, from sampled attention."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.flex_pattern import reference

__all__ = ["pooled_distance"]


def pooled_distance(
    sample: torch.Tensor, key_block_mean: torch.Tensor, column_mass: torch.Tensor, scale: float, guard_zeros: bool
) -> torch.Tensor:
    """Jensen-Shannon distance between pooled and sampled attention over key blocks.

    FlexPrefill, arXiv 2502.20766, section 3.2. The distance is computed in Triton on CUDA, else in PyTorch.

    Args:
        sample: ``[rows, query_heads, head_size]`` last queries of the prompt chunk.
        key_block_mean: float32 ``[kv_heads, blocks, head_size]`` mean key of each key block.
        column_mass: float32 ``[query_heads, blocks]`` sampled mass per key block; rows sum to 1.
        scale: softmax scale of the model.
        guard_zeros: take ``0 * log 0`` as 0; else such a head's distance is infinite, as in the official code.

    Returns:
        float32 ``[query_heads]``, 0 to sqrt(ln 2).
    """
    pooled = sample.mean(0, dtype=torch.float32).view(key_block_mean.shape[0], -1, sample.shape[2])
    logits = torch.matmul(pooled * scale, key_block_mean.transpose(1, 2)).flatten(0, 1)
    if logits.is_cuda:
        from vllm_sparse.kernels.flex_pattern import triton

        return triton.distance(logits, column_mass, guard_zeros)
    return reference.distance(logits, column_mass, guard_zeros)
