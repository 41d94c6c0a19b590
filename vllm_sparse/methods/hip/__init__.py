"""HiP: prefill, decode, and the stages of a search that both have."""

from vllm_sparse.methods.hip.decode import HipDecode
from vllm_sparse.methods.hip.prefill import Hip

__all__ = ["Hip", "HipDecode"]
