"""Executors: the platform's own dense paged kernel, run over shortened page tables.

Each row becomes one "request" of the kernel with its own page table and length; causal masking is anchored at the
bottom right, so a row's own positions, which end its list, are masked exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """One launch of a stock kernel over rows.

    Attributes:
        query_starts: int32 ``[rows + 1]`` first query token of each row.
        max_query_tokens: longest row.
        pages: int32 ``[rows, width]`` physical pages of the per-head view (`vllm_sparse.pages.to_physical`).
        kept_tokens: int32 ``[rows]``.
        page_size_tokens: tokens of a page.
    """

    query_starts: torch.Tensor
    max_query_tokens: int
    pages: torch.Tensor
    kept_tokens: torch.Tensor
    page_size_tokens: int


class Executor(ABC):
    """Runs one launch."""

    @abstractmethod
    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        """Attend.

        Args:
            launch: the rows.
            query: ``[tokens, heads_per_row, head_size]``, rows one after the other; all heads read one KV head.
            output: likewise, written.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, contiguous (LBHNC).
            scale: softmax scale.
        """


class FlashAttentionExecutor(Executor):
    """FlashAttention's paged variable-length kernel, as vLLM's FLASH_ATTN backend calls it (CUDA)."""

    def __init__(self, fa_version: int) -> None:
        self.fa_version = fa_version
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
            causal=True,
            block_table=launch.pages,
            fa_version=self.fa_version,
        )


class CpuExecutor(Executor):
    """vLLM's `cpu_attention_with_kv_cache`. It packs keys inside a block, so a page is a whole block."""

    def __init__(self, isa: str, kv_cache_dtype: str) -> None:
        self.isa = isa
        self.kv_cache_dtype = kv_cache_dtype

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        from vllm import _custom_ops as ops

        blocks, kv_heads, block_size, double_head_size = kv_cache.shape
        head_size = double_head_size // 2
        if launch.page_size_tokens != block_size:
            raise ValueError(
                f"the CPU kernel reads whole KV-cache blocks of {block_size} tokens, "
                f"got pages of {launch.page_size_tokens}"
            )
        pages = kv_cache.view(blocks * kv_heads, 1, 2 * block_size, head_size)
        key_cache, value_cache = pages.chunk(2, dim=2)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=launch.kept_tokens.shape[0],
            num_heads=query.shape[1],
            num_kv_heads=1,
            head_dim=head_size,
            seq_lens=launch.kept_tokens,
            dtype=query.dtype,
            query_start_loc=launch.query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=launch.query_starts,
            seq_lens=launch.kept_tokens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=launch.pages,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
