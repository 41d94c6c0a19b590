"""Tables of SALE's selection that no layer changes: which pages of prompt chunks are quantised, and who scores them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse.kernels.low_bit_scores.reference import PAGE_TOKENS, LowBitScoring, middle_end
from vllm_sparse.step.chunks import PromptBlocks, held_at_once, int_tables, parts_within

# Quantised pages of a chunk are padded to multiples of these, and rows are scored in tiles of those; kBatchPages and
# kWarpgroups * kRows in csrc/sm90.
BATCH_PAGES, TILE_ROWS = 32, 256
# Quantised keys of chunks that are scored together; if it is short, chunks take several launches.
SCRATCH_BYTES = 1 << 29
# Of a quantised page of a KV head with 128 channels: its levels, its mean and eight numbers.
PAGE_BYTES = PAGE_TOKENS * 128 + 2 * 128 + 32


@dataclass(frozen=True)
class MiddlePages:
    """Pages between the sink and the last local window of each prompt chunk, and tiles of the rows that score them.

    Attributes:
        starts: first quantised page of each chunk, a multiple of `BATCH_PAGES`, and the number of all, on the host.
        tile_starts: first tile of each chunk, and the number of all, on the host. A tile is `TILE_ROWS` adjacent
            queries of a chunk, or its last ones.
        page_start: int32 ``[chunks + 1]`` as `starts`.
        pages: int32 ``[chunks]`` first pages of each context that are quantised; 0 where none lies in the middle.
        batch_chunk: int32 ``[number of all / BATCH_PAGES]`` chunk of each batch of pages.
        tile_chunk: int32 ``[tiles]`` chunk of each tile.
        tile_row: int32 ``[tiles]`` its first query in the chunk.
    """

    starts: tuple[int, ...]
    tile_starts: tuple[int, ...]
    page_start: torch.Tensor
    pages: torch.Tensor
    batch_chunk: torch.Tensor
    tile_chunk: torch.Tensor
    tile_row: torch.Tensor

    def parts(self, kv_heads: int) -> list[range]:
        """Chunks that are scored together, as many as the memory allows: ascending ranges that cover all."""
        return parts_within(self.starts, SCRATCH_BYTES // (kv_heads * PAGE_BYTES))


def middle_pages(blocks: PromptBlocks, scoring: LowBitScoring) -> MiddlePages:
    """Tables of prompt chunks.

    Args:
        blocks: query blocks of the chunks.
        scoring: how they are scored.
    """
    sink_pages = scoring.sink_tokens // PAGE_TOKENS
    ends = [
        middle_end(span.query_tokens, span.seq_len, scoring.local_tokens, scoring.query_block_tokens)
        for span in blocks.spans
    ]
    pages = np.array([end if end > sink_pages else 0 for end in ends])
    batches = -(-pages // BATCH_PAGES)
    tiles = -(-np.array([span.query_tokens for span in blocks.spans]) // TILE_ROWS)
    starts, tile_starts = np.cumsum([0, *(batches * BATCH_PAGES)]), np.cumsum([0, *tiles])
    chunk = np.arange(len(pages))
    tile_chunk = np.repeat(chunk, tiles)
    tile_row = (np.arange(tile_starts[-1]) - tile_starts[tile_chunk]) * TILE_ROWS
    tables = int_tables((starts, pages, np.repeat(chunk, batches), tile_chunk, tile_row), blocks.chunk.device)
    page_start, page_counts, batch_chunk, chunk_of_tile, row_of_tile = tables
    return MiddlePages(
        tuple(starts.tolist()),
        tuple(tile_starts.tolist()),
        page_start,
        page_counts,
        batch_chunk,
        chunk_of_tile,
        row_of_tile,
    )


def scratch_bytes(chunks: int, pages: int, kv_heads: int) -> int:
    """Memory that `kept_maps` takes on a GPU for quantised keys of 128 channels.

    Args:
        chunks: prompt chunks.
        pages: of the longest context.
        kv_heads: of this process.
    """
    return held_at_once(chunks, pages * kv_heads * PAGE_BYTES, SCRATCH_BYTES)
