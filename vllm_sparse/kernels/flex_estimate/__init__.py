"""FlexPrefill's sample: where the last queries of a chunk look."""

from vllm_sparse.kernels.flex_estimate.reference import FlexEstimate, TokenProfiles, flex_estimate, token_profiles

__all__ = ["FlexEstimate", "TokenProfiles", "flex_estimate", "token_profiles"]
