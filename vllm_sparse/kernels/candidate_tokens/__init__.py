"""The best tokens of pages that a first stage has kept, by their exact attention.

`best_candidates` chooses for one request on any device; ``triton.best_candidates`` for all rows of a decode step, from
the pages' scores on, for CUDA graphs.
"""

from vllm_sparse.kernels.candidate_tokens.reference import COVERAGE_UNITS, best_candidates

__all__ = ["COVERAGE_UNITS", "best_candidates"]
