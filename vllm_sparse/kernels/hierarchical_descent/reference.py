"""Hierarchical pruning of keys in PyTorch: the specification, on any device, without a device-to-host sync.

InfiniteHiP (arXiv 2502.08910, algorithms 1 and 2), with the midpoint representatives and the running maximum of its
implementation. Written from the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.keys import PagedKeys

LEAF_TOKENS = 16
# Keys that a step gathers at once for some query blocks. Small, so that on a CPU the product finds them in its cache.
TILE_KEYS = 16384


@dataclass(frozen=True)
class Stage:
    """One pruning of the keys that the stage before it kept.

    Attributes:
        chunk_tokens: length of its chunks, a power of two of at least `LEAF_TOKENS`, below the stage before it.
        kept_tokens: most tokens that it keeps, a multiple of `chunk_tokens`.
        query_stride: adjacent queries that are averaged; divides the query block.
    """

    chunk_tokens: int
    kept_tokens: int
    query_stride: int = 1

    @property
    def kept_chunks(self) -> int:
        return self.kept_tokens // self.chunk_tokens


def search_start(sink_tokens: int) -> int:
    """First token after the sink, whose last leaf is whole."""
    return -(-sink_tokens // LEAF_TOKENS) * LEAF_TOKENS


def search_stop(chunk: int, context: int, query_block: int, window_tokens: int) -> int:
    """End of the search range of the last query block; no other reaches further."""
    return context - 1 - (chunk - 1) % query_block - window_tokens


def pruning_stages(stages: Sequence[Stage], range_tokens: int) -> list[Stage]:
    """The stages that prune something of a search range; the others keep what they get, whatever its scores are."""
    pruning = []
    for stage in stages:
        if stage.kept_tokens < range_tokens:
            pruning.append(stage)
            range_tokens = stage.kept_tokens
    return pruning


def reachable_leaves(chunk: int, context: int, query_block: int, device: torch.device) -> torch.Tensor:
    """Leaves that begin no later than each query block ends: bool ``[query_blocks, leaves]``."""
    _, last = query_blocks(chunk, context, query_block, device)
    return torch.arange(0, context, LEAF_TOKENS, device=device) <= last.unsqueeze(1)


def forced_leaves(context: int, begin: int, end: torch.Tensor) -> torch.Tensor:
    """Leaves that are kept whatever a search says, those of the future included: bool ``[..., leaves]``.

    Args:
        context: tokens in the request's cache.
        begin: first token of the search range, after the sink.
        end: integer ``[..., 1]`` token after the range, where the window starts.
    """
    leaf_start = torch.arange(0, context, LEAF_TOKENS, device=end.device)
    return (leaf_start < begin) | (leaf_start + LEAF_TOKENS > end)


def candidates(stages: Sequence[Stage], range_tokens: int) -> list[int]:
    """Most chunks that each stage chooses from; the first one has a range of `range_tokens`."""
    lengths = [range_tokens, *(stage.kept_tokens for stage in stages)]
    return [-(-length // stage.chunk_tokens) for length, stage in zip(lengths, stages, strict=False)]


def averaged_queries(query: torch.Tensor, stride: int) -> torch.Tensor:
    """Means of `stride` adjacent queries, the last one of what is left: ``[ceil(chunk / stride), heads, head_size]``.

    Summed in float32 and rounded to the queries' dtype.
    """
    if stride == 1:
        return query
    chunk, heads, head_size = query.shape
    rows = -(-chunk // stride)
    padded = torch.nn.functional.pad(query.float(), (0, 0, 0, 0, 0, rows * stride - chunk))
    counts = torch.full((rows, 1, 1), float(stride), device=query.device)
    counts[-1] = chunk - (rows - 1) * stride
    return (padded.view(rows, stride, heads, head_size).sum(1) / counts).to(query.dtype)


def search_queries(queries: torch.Tensor, block_rows: int, heads: int, parts: int) -> torch.Tensor:
    """Rows of each search, float32 ``[parts, heads * query_blocks, block_rows * members, head_size]``.

    Args:
        queries: ``[rows, query_heads, head_size]``.
        block_rows: rows of a query block. A shorter last block repeats its last row, which changes no maximum.
        heads: lists of heads.
        parts: KV heads of a list.
    """
    rows, query_heads, head_size = queries.shape
    blocks = -(-rows // block_rows)
    row = torch.arange(blocks * block_rows, device=queries.device).clamp(max=rows - 1)
    split = queries[row].float().view(blocks, block_rows, heads, parts, query_heads // (heads * parts), head_size)
    return split.permute(3, 2, 0, 1, 4, 5).reshape(parts, heads * blocks, -1, head_size)


@dataclass(frozen=True)
class Searches:
    """Searches that run at once, each for a list of heads and a query block.

    Attributes:
        single_keys: reads keys at positions int64 ``[searches, n]``, once for each part of a list that reads several KV
            heads: ``[searches, n, head_size]``.
        begin: first token of all search ranges.
        end: int64 ``[searches, 1]`` token after each.
        range_tokens: length of the longest range.
    """

    single_keys: Callable[[torch.Tensor], Iterable[torch.Tensor]]
    begin: int
    end: torch.Tensor
    range_tokens: int

    def scores(self, queries: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Largest product of queries with single keys, float32 ``[searches, n]`` like the positions.

        Args:
            queries: of a stage, as `search_queries` returns them.
            position: int64 ``[searches, n]``.
        """
        best: torch.Tensor | None = None
        for part_queries, keys in zip(queries, self.single_keys(position), strict=True):
            score = torch.bmm(keys.float(), part_queries.transpose(1, 2)).amax(2)
            best = score if best is None else torch.maximum(best, score)
        assert best is not None
        return best

    def chunk_scores(
        self, queries: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, chunk_tokens: int
    ) -> torch.Tensor:
        """Largest score that a descent into each chunk meets, float32 ``[searches, n]``.

        A step compares the midpoint keys of the chunk's two halves and goes to the better half, to the left one if
        they are equal, until one key is left.

        Args:
            queries: of a stage, as `search_queries` returns them.
            start: int64 ``[searches, n]``.
            stop: likewise, above `start` by at most `chunk_tokens`.
            chunk_tokens: a power of two.
        """
        low, high = start, stop
        best = torch.full(start.shape, float("-inf"), device=start.device)
        # A shorter chunk has one key left before the last step.
        for _ in range(chunk_tokens.bit_length() - 1):
            middle = (low + high + 1) // 2
            # A half without keys stands for the one key that is left.
            right = torch.minimum((middle + high) // 2, high - 1)
            halves = self.scores(queries, torch.cat([(low + middle) // 2, right], dim=1))
            left_score, right_score = halves.chunk(2, dim=1)
            best = torch.maximum(best, torch.maximum(left_score, right_score))
            goes_left = left_score >= right_score
            low, high = torch.where(goes_left, low, middle), torch.where(goes_left, middle, high)
        return best

    def prune(
        self, stage: Stage, queries: torch.Tensor, parents: torch.Tensor | None, parent_tokens: int
    ) -> torch.Tensor:
        """Chunks that a stage keeps.

        Args:
            stage: the stage.
            queries: its queries, as `search_queries` returns them.
            parents: what the stage before it kept, as this function returns it; None if it is the first.
            parent_tokens: length of the parents; not read without them.

        Returns:
            int64 ``[searches, n]`` first tokens in ascending order. Chunks at or past a range's end, which are the
            last ones, are empty.
        """
        length = stage.chunk_tokens
        longest = -(-self.range_tokens // length)
        if parents is None:
            parents, parent_tokens = torch.full_like(self.end, self.begin), longest * length
        start = _split(parents, parent_tokens, length)[:, :longest]
        if start.shape[1] <= stage.kept_chunks:
            return start
        stop = torch.minimum(start + length, self.end)
        exists = start < stop
        score = self.chunk_scores(queries, torch.where(exists, start, 0), torch.where(exists, stop, 1), length)
        score = score.masked_fill(~exists, float("-inf"))
        best = score.sort(dim=1, descending=True, stable=True).indices[:, : stage.kept_chunks]
        return start.gather(1, best.sort(dim=1).values)

    def leaf_mask(self, kept: torch.Tensor, chunk_tokens: int, leaves: int) -> torch.Tensor:
        """Leaves of kept chunks as far as they lie in the search ranges: bool ``[searches, leaves]``."""
        start = _split(kept, chunk_tokens, LEAF_TOKENS)
        # Empty ones go to one spare column, which is cut off.
        column = torch.where(start < self.end, start // LEAF_TOKENS, leaves)
        mask = torch.zeros(kept.shape[0], leaves + 1, dtype=torch.bool, device=kept.device)
        return mask.scatter_(1, column, True)[:, :leaves]


def _split(start: torch.Tensor, length: int, part_length: int) -> torch.Tensor:
    """Starts of the parts of each chunk: ``[searches, n]`` to ``[searches, n * length / part_length]``."""
    offset = torch.arange(0, length, part_length, device=start.device)
    return (start.unsqueeze(2) + offset).flatten(1)


def hierarchical_descent(
    query: torch.Tensor,
    keys: PagedKeys,
    stages: Sequence[Stage],
    query_block: int,
    heads: int,
    sink_tokens: int,
    window_tokens: int,
    dense_tail_tokens: int,
) -> torch.Tensor:
    """The kept leaves; arguments as in the public function."""
    chunk, query_heads, _ = query.shape
    context, device = keys.context_tokens, query.device
    begin = search_start(sink_tokens)
    range_tokens = search_stop(chunk, context, query_block, window_tokens) - begin
    pruning = pruning_stages(stages, range_tokens)
    reachable = reachable_leaves(chunk, context, query_block, device)
    if not pruning:
        return reachable.expand(heads, -1, -1)
    first, last = query_blocks(chunk, context, query_block, device)
    # Where the window starts; at token 0 it is everything.
    end = (first - window_tokens).clamp(min=0).masked_fill(last >= context - dense_tail_tokens, 0)
    blocks, leaves = reachable.shape
    kept = (forced_leaves(context, begin, end.unsqueeze(1)) & reachable).repeat(heads, 1, 1)

    averaged = [averaged_queries(query, stage.query_stride) for stage in pruning]
    all_keys = keys.read(0, context).flatten(0, 1)
    # A list of heads that read several KV heads is searched in parts.
    parts = max(keys.num_kv_heads // heads, 1)
    first_kv_head = torch.arange(heads, device=device) * keys.num_kv_heads // heads
    first_key = (first_kv_head + torch.arange(parts, device=device).unsqueeze(1)) * context
    searches = max(TILE_KEYS // (2 * max(candidates(pruning, range_tokens))), 1)
    tile_heads = min(searches, heads)
    tile_blocks = max(searches // tile_heads, 1)
    for block in range(0, blocks, tile_blocks):
        stop_block = min(block + tile_blocks, blocks)
        tile_range_tokens = range_tokens - (blocks - stop_block) * query_block
        if tile_range_tokens <= 0:
            continue
        for head in range(0, heads, tile_heads):
            stop_head = min(head + tile_heads, heads)
            members = slice(head * query_heads // heads, stop_head * query_heads // heads)
            part_first_key = first_key[:, head:stop_head].repeat_interleave(stop_block - block, dim=1).unsqueeze(2)
            tile = Searches(
                functools.partial(_keys_of_parts, all_keys, part_first_key),
                begin,
                end[block:stop_block].repeat(stop_head - head).unsqueeze(1),
                tile_range_tokens,
            )
            chunks: torch.Tensor | None = None
            chunk_tokens = 0
            for queries, stage in zip(averaged, pruning, strict=True):
                block_rows = query_block // stage.query_stride
                rows = queries[block * block_rows : stop_block * block_rows, members]
                rows = search_queries(rows, block_rows, stop_head - head, parts)
                chunks = tile.prune(stage, rows, chunks, chunk_tokens)
                chunk_tokens = stage.chunk_tokens
            assert chunks is not None
            mask = tile.leaf_mask(chunks, chunk_tokens, leaves)
            kept[head:stop_head, block:stop_block] |= mask.view(stop_head - head, stop_block - block, leaves)
    return kept


def _keys_of_parts(keys: torch.Tensor, first_key: torch.Tensor, position: torch.Tensor) -> Iterator[torch.Tensor]:
    """Keys ``[kv_heads * context, head_size]`` at positions, once for each part, as `Searches` wants them.

    Args:
        keys: of all heads, one after the other.
        first_key: int64 ``[parts, searches, 1]`` row of a KV head's first key.
        position: int64 ``[searches, n]``.
    """
    for first in first_key:
        yield keys.index_select(0, (position + first).flatten()).view(*position.shape, -1)
