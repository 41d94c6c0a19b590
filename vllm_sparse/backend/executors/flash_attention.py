"""FlashAttention as executor (CUDA)."""

from __future__ import annotations

import torch

from vllm_sparse.step.launch import Executor, Launch


class FlashAttentionExecutor(Executor):
    """FlashAttention's paged variable-length kernel, as vLLM's FLASH_ATTN backend calls it (CUDA).

    Args:
        fa_version: of FlashAttention.
        soft_cap: on the layer's logits; 0: none.
    """

    def __init__(self, fa_version: int, soft_cap: float = 0.0) -> None:
        self.fa_version = fa_version
        self.soft_cap = soft_cap
        # Making views costs more host time than launching the kernel; a layer's cache does not move.
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def _pages(self, kv_cache: torch.Tensor, page_size_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of one head each: two ``[pages, page_size, 1, head_size]`` views."""
        from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

        place = (kv_cache.data_ptr(), page_size_tokens)
        if place not in self._views:
            pages = kv_cache.view(-1, page_size_tokens, 1, kv_cache.shape[3])
            head_size = kv_cache.shape[3] // 2
            keys, values = pages[..., :head_size], pages[..., head_size:]
            self._views[place] = canonicalize_singleton_dim_strides(keys), canonicalize_singleton_dim_strides(values)
        return self._views[place]

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        keys, values = self._pages(kv_cache, launch.page_size_tokens)
        flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=launch.query_starts,
            max_seqlen_q=launch.max_query_tokens,
            seqused_k=launch.kept_tokens,
            max_seqlen_k=launch.pages.shape[1] * launch.page_size_tokens,
            softmax_scale=scale,
            softcap=self.soft_cap,
            causal=True,
            block_table=launch.pages,
            fa_version=self.fa_version,
        )
