"""The best pages of a context: as page lists for one request, as token lists for a step's decode rows."""

from vllm_sparse.kernels.top_tokens.reference import top_pages

__all__ = ["top_pages"]
