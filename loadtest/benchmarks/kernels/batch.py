"""Requests that decode one token each, over one layer's heads in a paged cache."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from loadtest.benchmarks.kernels.cache import DenseAttention, executor_of, keys_of, new_cache, store
from loadtest.benchmarks.kernels.heads import Heads
from vllm_sparse.kernels.page_list import to_physical
from vllm_sparse.kernels.page_summaries import SummaryKind, store_summaries
from vllm_sparse.keys import PagedKeys
from vllm_sparse.pages import PageList
from vllm_sparse.step.launch import Launch

# Of the free memory, what caches may take; the rest is for scores, outputs and others.
CACHE_SHARE = 0.7


@dataclass(frozen=True)
class DecodeBatch:
    """The last tokens of one text, each the newest token of a request of its own.

    Row ``i`` of ``n`` is the text's position ``context - n + i``, so that rows ask different things, and reads no
    later key. All rows' keys and values are the text's; each row has a copy of them in the cache where they fit into
    memory, else rows take turns on fewer copies.

    Attributes:
        heads: the text's, with at least as many queries as rows.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major (LBHNC).
        block_table: int32 ``[rows, blocks]``, in random order.
        seq_lens: of each row.
        isa: packing of vLLM's CPU kernel, or None on CUDA.
        copies: of the text in the cache.
    """

    heads: Heads
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: list[int]
    isa: str | None
    copies: int

    @property
    def rows(self) -> int:
        """Requests."""
        return len(self.seq_lens)

    @property
    def query(self) -> torch.Tensor:
        """``[rows, query_heads, head_size]``."""
        return self.heads.query[-self.rows :]

    @property
    def page_size_tokens(self) -> int:
        """The executor's page size in decoding, as the backends pick it."""
        return 1 if self.isa is None else self.kv_cache.shape[2]

    def keys(self, row: int, seq_len: int) -> PagedKeys:
        """A row's first keys, as selection methods see them."""
        return keys_of(self.isa, self.kv_cache, self.block_table[row], seq_len)

    def contexts_of(self, steps: int) -> list[list[int]]:
        """Contexts of the rows in each of the last steps, which end with the batch's own."""
        return [[context - before for context in self.seq_lens] for before in reversed(range(steps))]

    def summaries(self, kind: SummaryKind) -> torch.Tensor:
        """Summaries of all rows' keys, by physical block, as a server has stored them by the time that it decodes."""
        blocks, kv_heads, block_size, double_head_size = self.kv_cache.shape
        shape = blocks, kv_heads, block_size // kind.page_tokens, kind.width(double_head_size // 2)
        stored = torch.empty(shape, dtype=kind.dtype(self.kv_cache.dtype), device=self.kv_cache.device)
        for row, context in enumerate(self.seq_lens):
            keys = self.keys(row, context)
            keys.summaries = stored
            store_summaries(keys, kind, 0)
        return stored

    def launch(self, lists: PageList) -> Launch:
        """A launch over all rows' lists, row by row one list a KV head or one a query head."""
        having = lists.pages.shape[0] // self.rows
        kv_heads, block_size = self.kv_cache.shape[1:3]
        device = self.kv_cache.device
        heads = torch.arange(having, device=device) // (having // kv_heads)
        tables = self.block_table.repeat_interleave(having, dim=0)
        pages = to_physical(lists, tables, heads.repeat(self.rows), block_size, kv_heads)
        starts = torch.arange(self.rows * having + 1, dtype=torch.int32, device=device)
        return Launch(starts, 1, pages, lists.kept_tokens, lists.page_size_tokens)

    def attend(self, launch: Launch) -> torch.Tensor:
        """Attention over lists by the platform's executor: ``[rows, query_heads, head_size]``."""
        query = self.query.reshape(len(launch.kept_tokens), -1, self.query.shape[2])
        output = torch.empty_like(query)
        executor_of(self.isa).run(launch, query, output, self.kv_cache, self.heads.scale)
        return output.view(self.query.shape)

    def dense(self) -> DenseAttention:
        """Attention over everything by the backend that vLLM would use; what it prepares once a step is done here."""
        device = self.kv_cache.device
        starts = torch.arange(self.rows + 1, dtype=torch.int32, device=device)
        lengths = torch.tensor(self.seq_lens, dtype=torch.int32, device=device)
        return DenseAttention(
            self.query.contiguous(),
            self.kv_cache,
            self.block_table,
            starts,
            lengths,
            1,
            max(self.seq_lens),
            self.heads.scale,
            self.isa,
        )


def free_bytes(device: torch.device) -> int:
    """Memory that nothing uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write_batch(heads: Heads, rows: int, block_size_tokens: int, most_bytes: int, seed: int) -> DecodeBatch:
    """Write a text once a row into a fresh cache, or as often as fits.

    Args:
        heads: of the text, with at least `rows` queries.
        rows: requests.
        block_size_tokens: tokens of a KV-cache block.
        most_bytes: that the cache may take; one copy is written in any case.
        seed: of the blocks' order; equal seeds and sizes give equal block tables.
    """
    blocks = -(-heads.context // block_size_tokens)
    kv_heads, _, head_size = heads.keys.shape
    copy_bytes = 2 * blocks * block_size_tokens * kv_heads * head_size * heads.keys.element_size()
    copies = min(max(most_bytes // copy_bytes, 1), rows)
    device = heads.keys.device
    order = torch.randperm(copies * blocks, generator=torch.Generator(device).manual_seed(seed), device=device)
    tables = order.view(copies, blocks)
    kv_cache = new_cache(heads, copies * blocks, block_size_tokens)
    for table in tables:
        isa = store(heads, kv_cache, table)
    contexts = [heads.context - rows + 1 + row for row in range(rows)]
    return DecodeBatch(heads, kv_cache, tables[torch.arange(rows, device=device) % copies].int(), contexts, isa, copies)
