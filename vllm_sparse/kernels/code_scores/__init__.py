"""Scores of all cached tokens for one decode query, from their keys' 2-bit codes.

`code_scores` scores one request's tokens on any device; ``triton.code_scores_of_rows`` those of all rows of a decode
step, for CUDA graphs.
"""

from vllm_sparse.kernels.code_scores.reference import code_scores

__all__ = ["code_scores"]
