"""Compaction of selection maps into page lists."""

from vllm_sparse.kernels.page_list.reference import blocks_to_pages, compact_pages

__all__ = ["blocks_to_pages", "compact_pages"]
