"""FlexPrefill's sample: the attention of the last queries of a prompt chunk, by key block and by distance."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.flex_estimate import reference
from vllm_sparse.kernels.flex_estimate.reference import FlexEstimate, TokenProfiles, token_profiles
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["FlexEstimate", "TokenProfiles", "flex_estimate", "token_profiles"]


def flex_estimate(sample: torch.Tensor, keys: PagedKeys, scale: float, block_size_tokens: int) -> FlexEstimate:
    """Mean attention of the sampled queries per key block and per distance band (FlexPrefill, arXiv 2502.20766).

    Runs in Triton on CUDA, else in PyTorch.

    Args:
        sample: ``[rows, query_heads, head_size]`` last queries of the prompt chunk, at the last `rows` positions.
        keys: the request's keys, those of the prompt chunk included.
        scale: softmax scale of the model.
        block_size_tokens: tokens of a key block and width of a distance band.
    """
    if sample.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.flex_estimate import triton

        masses = triton.block_masses(sample, keys, scale, block_size_tokens)
        return triton.combine(masses, keys.seq_len, block_size_tokens)
    masses = reference.block_masses(sample, keys, scale, block_size_tokens)
    return reference.combine(masses, keys.seq_len, block_size_tokens)
