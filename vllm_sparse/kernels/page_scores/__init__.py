"""Scores of all pages of a request for one decode query, from the pages' summaries.

`page_scores` scores one request's pages on any device; ``triton.page_scores`` those of all rows of a decode step, for
CUDA graphs.
"""

from vllm_sparse.kernels.page_scores.reference import page_scores

__all__ = ["page_scores"]
