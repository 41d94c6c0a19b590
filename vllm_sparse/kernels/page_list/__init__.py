"""Compaction of selection maps into page lists."""

from vllm_sparse.kernels.page_list.reference import blocks_to_pages, chunk_lists, compact_pages, query_blocks

__all__ = ["blocks_to_pages", "chunk_lists", "compact_pages", "query_blocks"]
