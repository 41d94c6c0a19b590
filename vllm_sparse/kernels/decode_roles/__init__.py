"""What each decode row does in each layer, worked out on the device, and the two attentions' outputs made one."""

from __future__ import annotations

from vllm_sparse.kernels.decode_roles.reference import LayerContexts, RowSettings

__all__ = ["LayerContexts", "RowSettings"]
