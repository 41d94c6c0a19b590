"""A layer's heads in a paged KV cache as the platform stores them, and the platform's dense attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loadtest.benchmarks.kernels.heads import Heads
from vllm_sparse.backend.executors.cpu import CpuExecutor
from vllm_sparse.backend.executors.flash_attention import FlashAttentionExecutor
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.step.launch import Executor

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
        return keys_of(self.isa, self.kv_cache, self.block_table, self.heads.context)

    @property
    def executor(self) -> Executor:
        """The platform's."""
        return executor_of(self.isa)

    def page_size(self, wanted_tokens: int) -> int:
        """Executor's page size for a method that chooses `wanted_tokens` at a time, as the backends pick it."""
        return min(wanted_tokens, self.kv_cache.shape[2]) if self.isa is None else self.kv_cache.shape[2]

    def dense(self) -> torch.Tensor:
        """The chunk's attention by the backend that vLLM would use: ``[chunk, query_heads, head_size]``."""
        query = self.heads.query
        starts = torch.tensor([0, self.heads.chunk], dtype=torch.int32, device=query.device)
        lengths = torch.tensor([self.heads.context], dtype=torch.int32, device=query.device)
        table = self.block_table.unsqueeze(0)
        chunk, context, scale = self.heads.chunk, self.heads.context, self.heads.scale
        return DenseAttention(query, self.kv_cache, table, starts, lengths, chunk, context, scale, self.isa)()


def keys_of(isa: str | None, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> PagedKeys:
    """A request's keys as selection methods see them; `isa` as in `Cache`, the rest as in `PagedKeys`."""
    if isa is None:
        return PlainKeys(kv_cache, block_table, seq_len)
    from vllm_sparse.backend.cpu import PACKINGS

    return PACKINGS[isa](kv_cache, block_table, seq_len)


def executor_of(isa: str | None) -> Executor:
    """The platform's executor; `isa` as in `Cache`."""
    return FlashAttentionExecutor(FLASH_ATTENTION_VERSION) if isa is None else CpuExecutor(isa, "auto")


class DenseAttention:
    """Causal attention of requests over all their tokens, by the backend that vLLM would use.

    What that backend prepares once a step is prepared here: the CPU kernel's schedule, and for decoding that of
    FlashAttention 3 with as many splits as vLLM allows it in CUDA graphs.

    Args:
        query: ``[tokens, query_heads, head_size]``, requests one after the other, each at its last positions.
        kv_cache: as in `Cache`.
        block_table: int32 ``[requests, blocks]``.
        query_starts: int32 ``[requests + 1]`` first query token of each request.
        seq_lens: int32 ``[requests]``.
        longest_query: the most tokens of a request's query; known to the host, which does not wait for the device.
        longest_context: likewise of a request's context.
        scale: softmax scale.
        isa: as in `Cache`.
    """

    def __init__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_starts: torch.Tensor,
        seq_lens: torch.Tensor,
        longest_query: int,
        longest_context: int,
        scale: float,
        isa: str | None,
    ) -> None:
        self.query = query
        self.block_table = block_table
        self.query_starts = query_starts
        self.seq_lens = seq_lens
        self.scale = scale
        self.isa = isa
        self.longest_query = longest_query
        self.longest_context = longest_context
        blocks, kv_heads, block_size, double_head_size = kv_cache.shape
        if isa is None:
            from vllm.config import AttentionConfig

            self.keys, self.values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
            # 0: as many splits as the kernel likes.
            self.splits = 0 if self.longest_query > 1 else AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
            self.schedule = self._flash_schedule(kv_heads, block_size) if self.longest_query == 1 else None
            return
        from vllm import _custom_ops as ops

        packed = kv_cache.view(blocks, kv_heads, 2 * block_size, double_head_size // 2)
        self.keys, self.values = packed.chunk(2, dim=2)
        self.schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=seq_lens.shape[0],
            num_heads=query.shape[1],
            num_kv_heads=kv_heads,
            head_dim=query.shape[2],
            seq_lens=seq_lens,
            dtype=query.dtype,
            query_start_loc=query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
            kv_cache_dtype="auto",
        )

    def _flash_schedule(self, kv_heads: int, block_size_tokens: int) -> Any:
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

        return get_scheduler_metadata(
            batch_size=self.seq_lens.shape[0],
            max_seqlen_q=self.longest_query,
            max_seqlen_k=self.longest_context,
            num_heads_q=self.query.shape[1],
            num_heads_kv=kv_heads,
            headdim=self.query.shape[2],
            cache_seqlens=self.seq_lens,
            qkv_dtype=self.query.dtype,
            cu_seqlens_q=self.query_starts,
            page_size=block_size_tokens,
            causal=True,
            num_splits=self.splits,
        )

    def __call__(self) -> torch.Tensor:
        """The output, of the query's shape."""
        output = torch.empty_like(self.query)
        if self.isa is None:
            from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

            flash_attn_varlen_func(
                q=self.query,
                k=self.keys,
                v=self.values,
                out=output,
                cu_seqlens_q=self.query_starts,
                max_seqlen_q=self.longest_query,
                seqused_k=self.seq_lens,
                max_seqlen_k=self.longest_context,
                softmax_scale=self.scale,
                causal=True,
                block_table=self.block_table,
                scheduler_metadata=self.schedule,
                num_splits=self.splits,
                fa_version=FLASH_ATTENTION_VERSION,
            )
            return output
        from vllm import _custom_ops as ops

        ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=self.keys,
            value_cache=self.values,
            output=output,
            query_start_loc=self.query_starts,
            seq_lens=self.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0.0,
            scheduler_metadata=self.schedule,
            s_aux=None,
            kv_cache_dtype="auto",
        )
        return output


def new_cache(heads: Heads, blocks: int, block_size_tokens: int) -> torch.Tensor:
    """An empty cache for a layer of these heads."""
    kv_heads, _, head_size = heads.keys.shape
    shape = (blocks, kv_heads, block_size_tokens, 2 * head_size)
    return torch.zeros(shape, dtype=heads.keys.dtype, device=heads.keys.device)


def store(heads: Heads, kv_cache: torch.Tensor, block_table: torch.Tensor) -> str | None:
    """Write keys and values into the blocks of a request.

    Returns:
        The packing that was used, as in `Cache`.
    """
    blocks, kv_heads, block_size, double_head_size = kv_cache.shape
    head_size = double_head_size // 2
    position = torch.arange(heads.context, device=kv_cache.device)
    block, offset = block_table.long()[position // block_size], position % block_size
    if kv_cache.is_cuda:
        kv_cache[block, :, offset, :head_size] = heads.keys.transpose(0, 1)
        kv_cache[block, :, offset, head_size:] = heads.values.transpose(0, 1)
        return None
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa: str = _get_attn_isa(heads.keys.dtype, block_size, head_size)
    key_cache, value_cache = kv_cache.view(blocks, kv_heads, 2 * block_size, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        heads.keys.transpose(0, 1).contiguous(),
        heads.values.transpose(0, 1).contiguous(),
        key_cache,
        value_cache,
        block * block_size + offset,
        isa,
    )
    return isa


def write_cache(heads: Heads, block_size_tokens: int, generator: torch.Generator) -> Cache:
    """Write heads into a fresh cache; the generator is on the heads' device."""
    blocks = -(-heads.context // block_size_tokens)
    block_table = torch.randperm(blocks, generator=generator, device=heads.keys.device)
    kv_cache = new_cache(heads, blocks, block_size_tokens)
    isa = store(heads, kv_cache, block_table)
    return Cache(heads, kv_cache, block_table.int(), isa)
