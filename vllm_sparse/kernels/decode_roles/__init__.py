"""Role of each decode row in each layer, computed on the device, and the merge of dense and sparse outputs."""

from __future__ import annotations

from vllm_sparse.kernels.decode_roles.reference import LayerContexts, RowSettings

__all__ = ["LayerContexts", "RowSettings"]
