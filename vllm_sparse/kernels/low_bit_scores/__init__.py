"""SALE's selection: the pages with a key that few-bit scores give a share of a row's nearby attention."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.low_bit_scores import reference
from vllm_sparse.kernels.low_bit_scores.reference import PAGE_TOKENS, LowBitScoring
from vllm_sparse.kernels.low_bit_scores.tables import MiddlePages, middle_pages, scratch_bytes
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks

__all__ = ["PAGE_TOKENS", "LowBitScoring", "MiddlePages", "kept_maps", "middle_pages", "scratch_bytes"]


def kept_maps(chunks: PromptChunks, middle: MiddlePages, log_tau: torch.Tensor, scoring: LowBitScoring) -> torch.Tensor:
    """Keep the pages of 32 keys in which a key scores ``m + log(tau * l)`` or more in some row of a query block.

    For each row, `m` is the largest score over the sink and the local window, and `l` the sum of ``exp(score - m)``
    over the same keys. These scores are exact, and both regions are always kept. Other keys are scored by integers of a
    few bits (SALE, arXiv 2505.24179, sections 3.1 and 3.2). With 8 bits, a score is raised by the most that rounding
    may have lowered it, so each key whose attention probability is at least tau is kept: `l` sums over a part of the
    keys, so it is at most the sum over all. With 4 bits, the scores are the paper's and promise nothing.

    Runs in CUDA where the kernels of csrc/ support the inputs, else in Triton on CUDA, in as many launches as one chunk
    needs unless the memory for quantised keys is short; else in PyTorch.

    Args:
        chunks: the prompt chunks.
        middle: of their query blocks.
        log_tau: float32 ``[query_heads]`` natural logarithm of the threshold; minus infinity keeps all pages.
        scoring: the integers, the regions that are always kept, and the query blocks.

    Returns:
        bool ``[query_heads, blocks, ceil(longest context / 32)]``. Pages after a query block's last position may be
        kept or not.
    """
    if chunks.query.is_cuda and isinstance(chunks.keys[0], PlainKeys):
        if middle.starts[-1] == 0:
            shape = chunks.query.shape[1], chunks.blocks.blocks, -(-chunks.blocks.longest_seq_len // PAGE_TOKENS)
            return torch.ones(shape, dtype=torch.bool, device=chunks.query.device)
        from vllm_sparse.kernels.low_bit_scores import cuda, triton

        if cuda.can_run(chunks):
            return cuda.kept_maps(chunks, middle, log_tau, scoring)
        return triton.kept_maps(chunks, middle, log_tau, scoring)
    return reference.kept_maps(chunks, log_tau, scoring)
