"""FlexPrefill's sample: where the last queries of a chunk look."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.flex_estimate import reference
from vllm_sparse.kernels.flex_estimate.reference import FlexEstimate, TokenProfiles, token_profiles
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["FlexEstimate", "TokenProfiles", "flex_estimate", "token_profiles"]


def flex_estimate(sample: torch.Tensor, keys: PagedKeys, scale: float, block_size_tokens: int) -> FlexEstimate:
    """Mean attention of the sampled rows per key block and per distance band.

    Runs in Triton on CUDA, else in PyTorch.

    Args:
        sample: ``[rows, query_heads, head_size]`` the last queries of the chunk, at the last `rows` positions.
        keys: the request's keys, the chunk's included.
        scale: softmax scale.
        block_size_tokens: tokens of a selection block.
    """
    if sample.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.flex_estimate import triton

        masses = triton.block_masses(sample, keys, scale, block_size_tokens)
        return triton.combine(masses, keys.context_tokens, block_size_tokens)
    masses = reference.block_masses(sample, keys, scale, block_size_tokens)
    return reference.combine(masses, keys.context_tokens, block_size_tokens)
