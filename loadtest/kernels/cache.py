"""A layer's heads in a paged KV cache as the platform stores them, and the platform's dense attention over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loadtest.kernels.heads import Heads
from vllm_sparse.executors import CpuExecutor, Executor, FlashAttentionExecutor
from vllm_sparse.keys import PagedKeys, PlainKeys

FLASH_ATTENTION_VERSION = 3


@dataclass(frozen=True)
class Cache:
    """Heads in a paged cache, on physical blocks in random order.

    Attributes:
        heads: what was written.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major (LBHNC).
        block_table: int32 ``[blocks]``.
        isa: packing of vLLM's CPU kernel, or None on CUDA.
    """

    heads: Heads
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    isa: str | None

    @property
    def keys(self) -> PagedKeys:
        """As selection methods see them."""
        if self.isa is None:
            return PlainKeys(self.kv_cache, self.block_table, self.heads.context)
        from vllm_sparse.backend.cpu import PACKINGS

        return PACKINGS[self.isa](self.kv_cache, self.block_table, self.heads.context)

    @property
    def executor(self) -> Executor:
        """The platform's."""
        return FlashAttentionExecutor(FLASH_ATTENTION_VERSION) if self.isa is None else CpuExecutor(self.isa, "auto")

    def page_size(self, wanted_tokens: int) -> int:
        """Executor's page size for a method that chooses `wanted_tokens` at a time, as the backends pick it."""
        return min(wanted_tokens, self.kv_cache.shape[2]) if self.isa is None else self.kv_cache.shape[2]

    def dense(self) -> torch.Tensor:
        """The chunk's attention by the backend that vLLM would use: ``[chunk, query_heads, head_size]``."""
        query = self.heads.query
        device = query.device
        output = torch.empty_like(query)
        starts = torch.tensor([0, self.heads.chunk], dtype=torch.int32, device=device)
        lengths = torch.tensor([self.heads.context], dtype=torch.int32, device=device)
        if self.isa is None:
            from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

            key_cache, value_cache = self.kv_cache.transpose(1, 2).chunk(2, dim=-1)
            flash_attn_varlen_func(
                q=query,
                k=key_cache,
                v=value_cache,
                out=output,
                cu_seqlens_q=starts,
                max_seqlen_q=self.heads.chunk,
                seqused_k=lengths,
                max_seqlen_k=self.heads.context,
                softmax_scale=self.heads.scale,
                causal=True,
                block_table=self.block_table.unsqueeze(0),
                fa_version=FLASH_ATTENTION_VERSION,
            )
            return output
        from vllm import _custom_ops as ops

        blocks, kv_heads, block_size, double_head_size = self.kv_cache.shape
        packed = self.kv_cache.view(blocks, kv_heads, 2 * block_size, double_head_size // 2)
        key_cache, value_cache = packed.chunk(2, dim=2)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=query.shape[1],
            num_kv_heads=kv_heads,
            head_dim=query.shape[2],
            seq_lens=lengths,
            dtype=query.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            kv_cache_dtype="auto",
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=self.heads.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table.unsqueeze(0),
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
            kv_cache_dtype="auto",
        )
        return output


def write_cache(heads: Heads, block_size_tokens: int, generator: torch.Generator) -> Cache:
    """Write heads into a fresh cache; the generator is on the heads' device."""
    kv_heads, context, head_size = heads.keys.shape
    device = heads.keys.device
    blocks = -(-context // block_size_tokens)
    block_table = torch.randperm(blocks, generator=generator, device=device)
    shape = (blocks, kv_heads, block_size_tokens, 2 * head_size)
    kv_cache = torch.zeros(shape, dtype=heads.keys.dtype, device=device)
    position = torch.arange(context, device=device)
    block, offset = block_table[position // block_size_tokens], position % block_size_tokens
    if device.type == "cuda":
        kv_cache[block, :, offset, :head_size] = heads.keys.transpose(0, 1)
        kv_cache[block, :, offset, head_size:] = heads.values.transpose(0, 1)
        return Cache(heads, kv_cache, block_table.int(), None)
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(heads.keys.dtype, block_size_tokens, head_size)
    key_cache, value_cache = kv_cache.view(blocks, kv_heads, 2 * block_size_tokens, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        heads.keys.transpose(0, 1).contiguous(),
        heads.values.transpose(0, 1).contiguous(),
        key_cache,
        value_cache,
        block * block_size_tokens + offset,
        isa,
    )
    return Cache(heads, kv_cache, block_table.int(), isa)
