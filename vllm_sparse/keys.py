"""How methods read keys: one class for each way in which a platform packs keys into the paged KV cache.

Methods see keys in logical order, ``[kv_heads, tokens, head_size]``, and never a physical block number.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Self

import torch

PLAIN_BLOCK_TOKENS = 128


class PagedKeys(ABC):
    """Keys of one request, read from the paged cache in logical order.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major (LBHNC).
        block_table: int32 ``[>= ceil(seq_len / block_size)]`` physical blocks of the request.
        seq_len: tokens in the cache, those of this step included.

    Attributes:
        summaries: page summaries of the layer (`vllm_sparse.kernels.page_summaries`), stored by physical block:
            ``[blocks, kv_heads, block_size / page_tokens, width]`` in the cache's dtype; None if none are stored.
    """

    summaries: torch.Tensor | None = None

    def __init__(self, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> None:
        self.kv_cache = kv_cache
        self.block_table = block_table
        self.seq_len = seq_len
        self.num_kv_heads = kv_cache.shape[1]
        self.block_size_tokens = kv_cache.shape[2]
        self.head_size = kv_cache.shape[3] // 2

    def until(self, seq_len: int) -> Self:
        """The same request's keys when its cache held so many tokens."""
        earlier = copy.copy(self)
        earlier.seq_len = seq_len
        return earlier

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Keys at positions ``start`` to ``stop - 1``: ``[kv_heads, stop - start, head_size]``, in the cache's dtype.

        Raises:
            ValueError: the range is empty or reaches outside of the context.
        """
        if not 0 <= start < stop <= self.seq_len:
            raise ValueError(f"keys {start} to {stop} asked for, the context holds 0 to {self.seq_len}")
        first_block = start // self.block_size_tokens
        last_block = (stop - 1) // self.block_size_tokens
        blocks = self.block_table[first_block : last_block + 1].long()
        keys = self._unpack(blocks)
        offset = first_block * self.block_size_tokens
        return keys[:, start - offset : stop - offset]

    def gather(self, position: torch.Tensor) -> torch.Tensor:
        """Keys at single positions, without a copy of the keys between them and without a device-to-host sync.

        Args:
            position: int64 ``[kv_heads, n]`` positions for each KV head, which must lie in the context.

        Returns:
            ``[kv_heads, n, head_size]`` in the cache's dtype.
        """
        block = self.block_table[position // self.block_size_tokens].long()
        head = torch.arange(self.num_kv_heads, device=position.device).unsqueeze(1)
        return self._pick(block, head, position % self.block_size_tokens)

    @abstractmethod
    def _unpack(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of whole physical blocks ``[n]``: ``[kv_heads, n * block_size, head_size]``."""

    @abstractmethod
    def _pick(self, block: torch.Tensor, head: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Keys by physical block, KV head and offset in the block, int64 of one shape: ``[..., head_size]``."""


def readable_dtype(cache_dtype: torch.dtype) -> torch.dtype:
    """In which products take a cache's numbers: those of an FP8 cache in bfloat16, which holds each of them exactly."""
    return torch.bfloat16 if cache_dtype == torch.float8_e4m3fn else cache_dtype


class PlainKeys(PagedKeys):
    """Keys as FlashAttention stores them: a token's value follows its key. Those of an FP8 cache come in bfloat16."""

    def _unpack(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._readable(self._stored()[blocks]).transpose(0, 1).flatten(1, 2)

    def _pick(self, block: torch.Tensor, head: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return self._readable(self._stored()[block, head, offset])

    def _stored(self) -> torch.Tensor:
        keys = self.kv_cache[..., : self.head_size]
        # PyTorch does not index FP8 on every device.
        return keys.view(torch.uint8) if keys.dtype == torch.float8_e4m3fn else keys

    def _readable(self, stored: torch.Tensor) -> torch.Tensor:
        dtype = self.kv_cache.dtype
        return stored if stored.dtype == dtype else stored.view(dtype).to(readable_dtype(dtype))


def plain_keys(key: torch.Tensor) -> PlainKeys:
    """Copy keys into a paged cache with blocks of `PLAIN_BLOCK_TOKENS` in order, for tools that run without a server.

    Args:
        key: ``[kv_heads, tokens, head_size]``.
    """
    kv_heads, tokens, head_size = key.shape
    blocks = -(-tokens // PLAIN_BLOCK_TOKENS)
    cache = key.new_zeros(kv_heads, blocks * PLAIN_BLOCK_TOKENS, 2 * head_size)
    cache[:, :tokens, :head_size] = key
    cache = cache.view(kv_heads, blocks, PLAIN_BLOCK_TOKENS, -1).transpose(0, 1)
    return PlainKeys(cache, torch.arange(blocks, dtype=torch.int32, device=key.device), tokens)


class TransposedKeys(PagedKeys):
    """Keys as vLLM's CPU kernel stores them for its `vec` instruction sets: ``[head_size, block_size]`` per block."""

    def _unpack(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._packed()[blocks].permute(1, 0, 3, 2).flatten(1, 2)

    def _pick(self, block: torch.Tensor, head: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return self._packed()[block, head, :, offset]

    def _packed(self) -> torch.Tensor:
        keys = self.kv_cache.flatten(2)[..., : self.block_size_tokens * self.head_size]
        return keys.view(*keys.shape[:2], self.head_size, self.block_size_tokens)


class InterleavedPairKeys(PagedKeys):
    """Keys as vLLM's CPU kernel stores them for AMX: ``[block_size / 16][head_size / 2][16 tokens][2]`` per block."""

    def _unpack(self, blocks: torch.Tensor) -> torch.Tensor:
        keys = self._packed()[blocks].permute(1, 0, 2, 4, 3, 5)
        return keys.reshape(self.num_kv_heads, -1, self.head_size)

    def _pick(self, block: torch.Tensor, head: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return self._packed()[block, head, offset // 16, :, offset % 16].flatten(-2)

    def _packed(self) -> torch.Tensor:
        keys = self.kv_cache.flatten(2)[..., : self.block_size_tokens * self.head_size]
        return keys.view(*keys.shape[:2], self.block_size_tokens // 16, self.head_size // 2, 16, 2)
