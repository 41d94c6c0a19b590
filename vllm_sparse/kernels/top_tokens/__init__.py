"""The best pages of a context: as page lists for one request, as token lists for the decode rows of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse.kernels.cuda_library import cuda_library
from vllm_sparse.kernels.top_tokens.reference import TokenBudget, best_of_pages, top_pages

if TYPE_CHECKING:
    import torch

    from vllm_sparse.step.rows import DecodeRows, RowScores, TokenLists

__all__ = ["TokenBudget", "best_of_pages", "top_pages", "top_tokens"]


def top_tokens(scores: RowScores, rows: DecodeRows, knobs: torch.Tensor, lists: TokenLists) -> None:
    """Select each row's best units and write the slots of their tokens, on a GPU; arguments as `reference.top_tokens`.

    Runs in CUDA where the kernels of csrc/ are installed, else in Triton, which takes many times as long.
    """
    if cuda_library(rows.query.device) is not None:
        from vllm_sparse.kernels.top_tokens import cuda

        cuda.top_tokens(scores, rows, knobs, lists)
    else:
        from vllm_sparse.kernels.top_tokens import triton

        triton.top_tokens(scores, rows, knobs, lists)
