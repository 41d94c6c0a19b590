"""FlexPrefill's sample: the attention of the last queries of chunks or their stretches, by key block and distance."""

from __future__ import annotations

from vllm_sparse.kernels.flex_estimate import reference
from vllm_sparse.kernels.flex_estimate.reference import FlexEstimate, TokenProfiles, token_profiles
from vllm_sparse.kernels.flex_estimate.samples import Samples, last_queries
from vllm_sparse.kernels.flex_estimate.scratch import scratch_bytes
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks

__all__ = [
    "FlexEstimate",
    "Samples",
    "TokenProfiles",
    "flex_estimate",
    "last_queries",
    "scratch_bytes",
    "token_profiles",
]


def flex_estimate(chunks: PromptChunks, samples: Samples) -> FlexEstimate:
    """Mean attention of the sampled queries per key block and per distance band (FlexPrefill, arXiv 2502.20766).

    Runs in Triton on CUDA, in as many launches as one sample needs, unless the memory between them is short; else in
    PyTorch.

    Args:
        chunks: the prompt chunks, of any query blocks.
        samples: their last queries, or those of their stretches.
    """
    if chunks.query.is_cuda and isinstance(chunks.keys[0], PlainKeys):
        from vllm_sparse.kernels.flex_estimate import triton

        return triton.flex_estimate(chunks, samples)
    return reference.flex_estimate(chunks, samples)
