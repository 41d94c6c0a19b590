"""SALE's selection: the pages with a key that few-bit scores give a share of a row's nearby attention."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.low_bit_scores import reference
from vllm_sparse.kernels.low_bit_scores.reference import PAGE_TOKENS, LowBitScoring
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["PAGE_TOKENS", "LowBitScoring", "kept_map"]


def kept_map(
    query: torch.Tensor, keys: PagedKeys, scale: float, log_tau: torch.Tensor, scoring: LowBitScoring
) -> torch.Tensor:
    """Keep the pages of 32 keys in which a key scores ``m + log(tau * l)`` or more in some row of a query block.

    For each row, `m` is the largest score over the sink and the local window, and `l` the sum of ``exp(score - m)``
    over the same keys. These scores are exact, and both regions are always kept. Other keys are scored by integers of a
    few bits (SALE, arXiv 2505.24179, sections 3.1 and 3.2). With 8 bits, a score is raised by the most that rounding
    may have lowered it, so each key whose attention probability is at least tau is kept: `l` sums over a part of the
    keys, so it is at most the sum over all. With 4 bits, the scores are the paper's and promise nothing.

    Runs in CUDA where the kernels of csrc/ support the inputs, else in Triton on CUDA, else in PyTorch.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of a prompt chunk, at the last positions of the context.
        keys: the request's keys, those of the prompt chunk included.
        scale: softmax scale of the model.
        log_tau: float32 ``[query_heads]`` natural logarithm of the threshold; minus infinity keeps all pages.
        scoring: the integers, the regions that are always kept, and the query blocks.

    Returns:
        bool ``[query_heads, ceil(query_tokens / query_block_tokens), ceil(context / 32)]``. Pages after a query block's
        last position may be kept or not.
    """
    if query.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.low_bit_scores import cuda, triton

        if cuda.can_run(query, keys):
            return cuda.kept_map(query, keys, scale, log_tau, scoring)
        return triton.kept_map(query, keys, scale, log_tau, scoring)
    return reference.kept_map(query, keys, scale, log_tau, scoring)
