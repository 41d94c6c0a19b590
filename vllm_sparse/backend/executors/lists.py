"""The executor over lists that the table of `rule` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse.backend.executors.flash_attention import ByPageSize, FlashAttentionExecutor
from vllm_sparse.backend.executors.triton_attention import TritonExecutor

if TYPE_CHECKING:
    from vllm_sparse.backend.executors.float8 import ValueScale
    from vllm_sparse.backend.executors.rule import Kernel, StockKernels
    from vllm_sparse.step.launch import Executor


def list_executor(kernels: StockKernels, value_scale: ValueScale | None = None, soft_cap: float = 0.0) -> Executor:
    """What reads lists on a GPU.

    Args:
        kernels: that serve it.
        value_scale: of an FP8 cache.
        soft_cap: on the layer's logits; 0: none.
    """

    def executor(kernel: Kernel) -> Executor:
        if kernel == "triton":
            return TritonExecutor(value_scale, soft_cap)
        assert kernels.flash_attn_version is not None
        return FlashAttentionExecutor(kernels.flash_attn_version, value_scale, soft_cap)

    page_lists = executor(kernels.page_lists)
    if kernels.page_lists == kernels.token_lists:
        return page_lists
    return ByPageSize(page_lists, executor(kernels.token_lists))
