"""FlashAttention as executor (CUDA)."""

from __future__ import annotations

import torch

from vllm_sparse.backend.executors.float8 import NO_SCALES, ValueScale
from vllm_sparse.backend.executors.head_pages import HeadPages
from vllm_sparse.step.launch import Executor, Launch

# Pages that FlashAttention 2 reads: of so many tokens, or of a multiple.
PAGE_TOKENS = 16


class FlashAttentionExecutor(Executor):
    """FlashAttention's paged variable-length kernel, as vLLM's FLASH_ATTN backend calls it (CUDA).

    Args:
        fa_version: of FlashAttention.
        value_scale: of an FP8 cache; the scales of queries and keys are in the softmax scale.
        soft_cap: on the layer's logits; 0: none.
    """

    def __init__(self, fa_version: int, value_scale: ValueScale | None = None, soft_cap: float = 0.0) -> None:
        self.fa_version = fa_version
        self.soft_cap = soft_cap
        self._value_scale = value_scale
        self._pages = HeadPages()

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        keys, values = self._pages.of(kv_cache, launch.page_size_tokens)
        scales = NO_SCALES if self._value_scale is None else self._value_scale.of_rows(launch.kept_tokens.shape[0])
        flash_attn_varlen_func(
            q=query if self._value_scale is None else query.to(keys.dtype),
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=launch.query_starts,
            max_seqlen_q=launch.max_query_tokens,
            seqused_k=launch.kept_tokens,
            max_seqlen_k=launch.pages.shape[1] * launch.page_size_tokens,
            softmax_scale=scale,
            causal=True,
            block_table=launch.pages,
            softcap=self.soft_cap,
            fa_version=self.fa_version,
            **scales,
        )


class ByPageSize(Executor):
    """One kernel for lists of pages and another for lists of smaller pages and single tokens.

    Args:
        page_lists: for pages of `PAGE_TOKENS` and multiples.
        token_lists: for others.
    """

    def __init__(self, page_lists: Executor, token_lists: Executor) -> None:
        self._page_lists = page_lists
        self._token_lists = token_lists

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        executor = self._token_lists if launch.page_size_tokens % PAGE_TOKENS else self._page_lists
        executor.run(launch, query, output, kv_cache, scale)
