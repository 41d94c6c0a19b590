"""Scores of all cached tokens for one decode query."""

from vllm_sparse.kernels.token_scores.reference import token_scores

__all__ = ["token_scores"]
