"""vLLM's CPU kernel as executor."""

from __future__ import annotations

import torch

from vllm_sparse.step.launch import Executor, Launch


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
