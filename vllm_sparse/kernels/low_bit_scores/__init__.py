"""SALE's selection: which pages hold a key that few-bit scores give a share of a row's nearby attention."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.low_bit_scores import reference
from vllm_sparse.kernels.low_bit_scores.reference import PAGE_TOKENS
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["PAGE_TOKENS", "kept_map"]


def kept_map(
    query: torch.Tensor,
    keys: PagedKeys,
    scale: float,
    log_tau: torch.Tensor,
    *,
    bits: int,
    page_bounds: bool,
    sink_tokens: int,
    local_tokens: int,
    query_block: int,
) -> torch.Tensor:
    """Keep the pages of 32 keys in which a key scores ``m + log(tau * l)`` in some row of a query block.

    `m` and `l` are the row's largest score and its sum of ``exp(score - m)`` over the sink and the local window, exact
    scores; both regions are always kept. Other keys are scored by integers of a few bits (SALE, arXiv 2505.24179).
    With 8 bits a score is raised by what its rounding may hide, so each key whose attention probability is at least
    tau is kept: the sum over a part of the keys is at most the sum over all. With 4 bits scores are the paper's.

    Runs in CUDA where the kernels of csrc/ are made for the inputs, else in Triton on CUDA, else in PyTorch.

    Args:
        query: ``[chunk, query_heads, head_size]`` at the last positions of the context.
        keys: the request's keys, the chunk's included.
        scale: softmax scale.
        log_tau: float32 ``[query_heads]`` logarithm of the threshold; minus infinity keeps everything.
        bits: 8 or 4.
        page_bounds: keep a page unscored if its mean key scores enough, drop it unscored if the mean's score and the
            distance of the farthest key from the mean exclude a key that does.
        sink_tokens: first tokens; a multiple of 32, at least 32.
        local_tokens: least tokens of the local window, which ends with the query block; rounded up to whole pages.
        query_block: query tokens that share a choice, 64 or 128.

    Returns:
        bool ``[query_heads, ceil(chunk / query_block), ceil(context / 32)]``. Pages behind a block's last position are
        kept or not.
    """
    knobs = bits, page_bounds, sink_tokens, local_tokens, query_block
    if query.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.low_bit_scores import cuda, triton

        if cuda.can_run(query, keys):
            return cuda.kept_map(query, keys, scale, log_tau, *knobs)
        return triton.kept_map(query, keys, scale, log_tau, *knobs)
    return reference.kept_map(query, keys, scale, log_tau, *knobs)
