"""HiP's selection in PyTorch: the specification, on any device, without a device-to-host sync.

It follows the formulas of InfiniteHiP (arXiv 2502.08910, algorithms 1 and 2). That a key block is represented by the
keys at midpoints, and scored by the largest product on the way, is taken from the paper's implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.keys import PagedKeys
from vllm_sparse.step.chunks import PromptChunks

LEAF_TOKENS = 16
# Keys that one step of the descents gathers at once. So few that on a CPU the product finds them in its cache.
TILE_KEYS = 16384


@dataclass(frozen=True)
class Stage:
    """One pruning of the keys that the stage before it kept.

    Attributes:
        key_block_tokens: tokens of a key block: a power of two, at least `LEAF_TOKENS`, less than in the stage before.
        kept_tokens: most tokens that the stage keeps, a multiple of `key_block_tokens`.
        query_stride: number of adjacent queries that are averaged; divides the query block.
    """

    key_block_tokens: int
    kept_tokens: int
    query_stride: int = 1

    @property
    def kept_key_blocks(self) -> int:
        """Most key blocks that the stage keeps."""
        return self.kept_tokens // self.key_block_tokens


@dataclass(frozen=True)
class DescentArguments:
    """What `hierarchical_descents` searches and what it always keeps, for all query blocks and heads alike.

    Attributes:
        stages: from the first to the last; `Stage.key_block_tokens` fall strictly, `Stage.kept_tokens` do not rise.
        query_block_tokens: query tokens that share a list; 1 for a decode step.
        sink_tokens: first tokens of the context, always kept, rounded up to whole leaves.
        window_tokens: tokens before a query block that are always kept.
        dense_tail_tokens: last queries of the prompt chunk whose query blocks keep everything.
    """

    stages: Sequence[Stage]
    query_block_tokens: int
    sink_tokens: int
    window_tokens: int
    dense_tail_tokens: int


def search_start(sink_tokens: int) -> int:
    """First token of all search ranges: the one after the sink, which ends with a whole leaf."""
    return -(-sink_tokens // LEAF_TOKENS) * LEAF_TOKENS


def search_stop(query_tokens: int, context: int, query_block_tokens: int, window_tokens: int) -> int:
    """Token after the search range of the last query block, whose range is the longest."""
    return context - 1 - (query_tokens - 1) % query_block_tokens - window_tokens


def pruning_stages(stages: Sequence[Stage], range_tokens: int) -> list[Stage]:
    """The stages that prune something of a search range of `range_tokens`; the others keep all that they get."""
    pruning = []
    for stage in stages:
        if stage.kept_tokens < range_tokens:
            pruning.append(stage)
            range_tokens = stage.kept_tokens
    return pruning


def reachable_leaves(query_tokens: int, context: int, query_block_tokens: int, device: torch.device) -> torch.Tensor:
    """Leaves that begin no later than the last query of each query block: bool ``[query_blocks, leaves]``."""
    _, last = query_blocks(query_tokens, context, query_block_tokens, device)
    return torch.arange(0, context, LEAF_TOKENS, device=device) <= last.unsqueeze(1)


def forced_leaves(context: int, begin: int, end: torch.Tensor) -> torch.Tensor:
    """Leaves outside of the search ranges, which are always kept; future ones are among them: bool ``[..., leaves]``.

    Args:
        context: tokens in the request's cache.
        begin: first token of the search range, which follows the sink.
        end: integer ``[..., 1]`` token after the search range, where the window starts.
    """
    leaf_start = torch.arange(0, context, LEAF_TOKENS, device=end.device)
    return (leaf_start < begin) | (leaf_start + LEAF_TOKENS > end)


def candidates(stages: Sequence[Stage], range_tokens: int) -> list[int]:
    """Most key blocks that each stage chooses from, where the search range has `range_tokens`."""
    lengths = [range_tokens, *(stage.kept_tokens for stage in stages)]
    return [-(-length // stage.key_block_tokens) for length, stage in zip(lengths, stages, strict=False)]


def averaged_queries(query: torch.Tensor, stride: int) -> torch.Tensor:
    """Means of `stride` adjacent queries, the last mean perhaps of fewer, summed in float32.

    Returns:
        ``[ceil(query_tokens / stride), query_heads, head_size]`` in the queries' dtype.
    """
    if stride == 1:
        return query
    query_tokens, heads, head_size = query.shape
    rows = -(-query_tokens // stride)
    padded = torch.nn.functional.pad(query.float(), (0, 0, 0, 0, 0, rows * stride - query_tokens))
    counts = torch.full((rows, 1, 1), float(stride), device=query.device)
    counts[-1] = query_tokens - (rows - 1) * stride
    return (padded.view(rows, stride, heads, head_size).sum(1) / counts).to(query.dtype)


def search_queries(queries: torch.Tensor, block_rows: int, heads: int, parts: int) -> torch.Tensor:
    """Queries of each search, float32 ``[parts, heads * query_blocks, block_rows * members, head_size]``.

    Args:
        queries: ``[rows, query_heads, head_size]``.
        block_rows: rows of a query block. A shorter last query block repeats its last row, which changes no maximum.
        heads: number of lists per query block.
        parts: number of KV heads that a list reads.
    """
    rows, query_heads, head_size = queries.shape
    blocks = -(-rows // block_rows)
    row = torch.arange(blocks * block_rows, device=queries.device).clamp(max=rows - 1)
    split = queries[row].float().view(blocks, block_rows, heads, parts, query_heads // (heads * parts), head_size)
    return split.permute(3, 2, 0, 1, 4, 5).reshape(parts, heads * blocks, -1, head_size)


@dataclass(frozen=True)
class Searches:
    """Searches that run at once, one for each list and query block.

    Attributes:
        single_keys: reads the keys at positions int64 ``[searches, n]``: yields ``[searches, n, head_size]`` for each
            of the KV heads that a list reads.
        begin: first token of all search ranges.
        end: int64 ``[searches, 1]`` token after each search range.
        range_tokens: tokens of the longest search range.
    """

    single_keys: Callable[[torch.Tensor], Iterable[torch.Tensor]]
    begin: int
    end: torch.Tensor
    range_tokens: int

    def scores(self, queries: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Largest product of a search's queries with each single key: float32 ``[searches, n]``.

        Args:
            queries: a stage's queries, as `search_queries` returns them.
            position: int64 ``[searches, n]`` positions of the keys.
        """
        best: torch.Tensor | None = None
        for part_queries, keys in zip(queries, self.single_keys(position), strict=True):
            score = torch.bmm(keys.float(), part_queries.transpose(1, 2)).amax(2)
            best = score if best is None else torch.maximum(best, score)
        assert best is not None
        return best

    def key_block_scores(
        self, queries: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, key_block_tokens: int
    ) -> torch.Tensor:
        """Largest score that a descent into each key block meets: float32 ``[searches, n]``.

        A step compares the midpoint keys of the two halves and enters the half of the higher score, the left one if
        both are equal, until one key is left.

        Args:
            queries: a stage's queries, as `search_queries` returns them.
            start: int64 ``[searches, n]`` first token of each key block.
            stop: int64 ``[searches, n]`` token after each key block, at most `key_block_tokens` above `start`.
            key_block_tokens: tokens of a whole key block, a power of two.
        """
        low, high = start, stop
        best = torch.full(start.shape, float("-inf"), device=start.device)
        # A shorter key block is down to one key before the last step.
        for _ in range(key_block_tokens.bit_length() - 1):
            middle = (low + high + 1) // 2
            # Where one key is left the right half is empty, and that key stands for it.
            right = torch.minimum((middle + high) // 2, high - 1)
            halves = self.scores(queries, torch.cat([(low + middle) // 2, right], dim=1))
            left_score, right_score = halves.chunk(2, dim=1)
            best = torch.maximum(best, torch.maximum(left_score, right_score))
            goes_left = left_score >= right_score
            low, high = torch.where(goes_left, low, middle), torch.where(goes_left, middle, high)
        return best

    def key_block_masses(
        self, queries: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, key_block_tokens: int, scale: float
    ) -> torch.Tensor:
        """Logarithm of the attention that a search's queries pay to each key block: float32 ``[searches, n]``.

        A query's attention is a softmax over the keys of these key blocks alone; that of a search's queries is summed.
        No paper's: HiP scores by single keys at every stage.

        Args:
            queries: a stage's queries, as `search_queries` returns them, of lists that read one KV head.
            start: int64 ``[searches, n]`` first token of each key block.
            stop: int64 ``[searches, n]`` token after it; at most `start` where a key block stands for no keys. One of
                each search stands for some.
            key_block_tokens: tokens of a whole key block.
            scale: softmax scale of the model.
        """
        (queries,) = queries
        position = start.unsqueeze(2) + torch.arange(key_block_tokens, device=start.device)
        live = position < stop.unsqueeze(2)
        (keys,) = self.single_keys(torch.where(live, position, 0).flatten(1))
        logits = torch.bmm(queries, keys.float().transpose(1, 2)).mul_(scale)
        logits.masked_fill_(~live.flatten(1).unsqueeze(1), float("-inf"))
        probabilities = logits.log_softmax(2).view(*logits.shape[:2], *live.shape[1:])
        return probabilities.logsumexp(3).logsumexp(1)

    def prune(
        self,
        stage: Stage,
        queries: torch.Tensor,
        parents: torch.Tensor | None,
        parent_tokens: int,
        mass_scale: float | None = None,
    ) -> torch.Tensor:
        """Key blocks that a stage keeps.

        Args:
            stage: the stage.
            queries: its queries, as `search_queries` returns them.
            parents: key blocks that the stage before kept, as this function returns them; None for the first stage.
            parent_tokens: tokens of a parent; ignored for the first stage.
            mass_scale: softmax scale, to score by `key_block_masses`; None: by descents.

        Returns:
            int64 ``[searches, n]`` first tokens of the key blocks, ascending. Those at or after the end of a search
            range are the last ones and stand for no keys.
        """
        length = stage.key_block_tokens
        longest = -(-self.range_tokens // length)
        if parents is None:
            parents, parent_tokens = torch.full_like(self.end, self.begin), longest * length
        start = _split(parents, parent_tokens, length)[:, :longest]
        if start.shape[1] <= stage.kept_key_blocks:
            return start
        stop = torch.minimum(start + length, self.end)
        exists = start < stop
        if mass_scale is not None:
            score = self.key_block_masses(queries, start, stop, length, mass_scale)
            return _best(start, score, stage.kept_key_blocks)
        score = self.key_block_scores(queries, torch.where(exists, start, 0), torch.where(exists, stop, 1), length)
        score = score.masked_fill(~exists, float("-inf"))
        return _best(start, score, stage.kept_key_blocks)

    def leaf_mask(self, kept: torch.Tensor, key_block_tokens: int, leaves: int) -> torch.Tensor:
        """Leaves of kept key blocks as far as they lie in the search ranges: bool ``[searches, leaves]``."""
        start = _split(kept, key_block_tokens, LEAF_TOKENS)
        # Leaves outside of the range are written to one spare column, which is cut off.
        column = torch.where(start < self.end, start // LEAF_TOKENS, leaves)
        mask = torch.zeros(kept.shape[0], leaves + 1, dtype=torch.bool, device=kept.device)
        return mask.scatter_(1, column, True)[:, :leaves]


def _best(start: torch.Tensor, score: torch.Tensor, count: int) -> torch.Tensor:
    """First tokens of the `count` key blocks of the highest scores, of equal ones the lower, ascending."""
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return start.gather(1, best.sort(dim=1).values)


def _split(start: torch.Tensor, length: int, part_length: int) -> torch.Tensor:
    """First tokens of the parts of each key block: ``[searches, n]`` to ``[searches, n * length / part_length]``."""
    offset = torch.arange(0, length, part_length, device=start.device)
    return (start.unsqueeze(2) + offset).flatten(1)


def hierarchical_descent(query: torch.Tensor, keys: PagedKeys, arguments: DescentArguments, heads: int) -> torch.Tensor:
    """Select the leaves that each query block of one prompt chunk reads, as the public function says.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of the chunk, at the last positions of the context.
        keys: the request's keys, those of the chunk included.
        arguments: as there.
        heads: likewise.

    Returns:
        bool ``[heads, ceil(query_tokens / query_block_tokens), ceil(context / LEAF_TOKENS)]``.
    """
    query_tokens, query_heads, _ = query.shape
    context, device = keys.seq_len, query.device
    query_block_tokens = arguments.query_block_tokens
    begin = search_start(arguments.sink_tokens)
    range_tokens = search_stop(query_tokens, context, query_block_tokens, arguments.window_tokens) - begin
    pruning = pruning_stages(arguments.stages, range_tokens)
    reachable = reachable_leaves(query_tokens, context, query_block_tokens, device)
    if not pruning:
        return reachable.expand(heads, -1, -1)
    first, last = query_blocks(query_tokens, context, query_block_tokens, device)
    # Where the window starts: at token 0 for query blocks that keep everything.
    end = (first - arguments.window_tokens).clamp(min=0)
    end = end.masked_fill(last >= context - arguments.dense_tail_tokens, 0)
    blocks, leaves = reachable.shape
    kept = (forced_leaves(context, begin, end.unsqueeze(1)) & reachable).repeat(heads, 1, 1)

    averaged = [averaged_queries(query, stage.query_stride) for stage in pruning]
    all_keys = keys.read(0, context).flatten(0, 1)
    # A list that reads several KV heads is searched one KV head at a time.
    parts = max(keys.num_kv_heads // heads, 1)
    first_kv_head = torch.arange(heads, device=device) * keys.num_kv_heads // heads
    first_key = (first_kv_head + torch.arange(parts, device=device).unsqueeze(1)) * context
    searches = max(TILE_KEYS // (2 * max(candidates(pruning, range_tokens))), 1)
    tile_heads = min(searches, heads)
    tile_blocks = max(searches // tile_heads, 1)
    for block in range(0, blocks, tile_blocks):
        stop_block = min(block + tile_blocks, blocks)
        tile_range_tokens = range_tokens - (blocks - stop_block) * query_block_tokens
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
            key_blocks: torch.Tensor | None = None
            key_block_tokens = 0
            for queries, stage in zip(averaged, pruning, strict=True):
                block_rows = query_block_tokens // stage.query_stride
                rows = queries[block * block_rows : stop_block * block_rows, members]
                rows = search_queries(rows, block_rows, stop_head - head, parts)
                key_blocks = tile.prune(stage, rows, key_blocks, key_block_tokens)
                key_block_tokens = stage.key_block_tokens
            assert key_blocks is not None
            mask = tile.leaf_mask(key_blocks, key_block_tokens, leaves)
            kept[head:stop_head, block:stop_block] |= mask.view(stop_head - head, stop_block - block, leaves)
    return kept


def hierarchical_descents(chunks: PromptChunks, arguments: DescentArguments, heads: int) -> torch.Tensor:
    """Select leaves of prompt chunks, one after another; arguments and result as in the public function."""
    blocks = chunks.blocks
    shape = heads, blocks.blocks, -(-blocks.longest_seq_len // LEAF_TOKENS)
    kept = torch.zeros(shape, dtype=torch.bool, device=chunks.query.device)
    for chunk, keys in enumerate(chunks.keys):
        rows, leaves = slice(blocks.starts[chunk], blocks.starts[chunk + 1]), -(-keys.seq_len // LEAF_TOKENS)
        kept[:, rows, :leaves] = hierarchical_descent(chunks.query_of(chunk), keys, arguments, heads)
    return kept


def _keys_of_parts(keys: torch.Tensor, first_key: torch.Tensor, position: torch.Tensor) -> Iterator[torch.Tensor]:
    """Keys at positions, once for each KV head that a list reads, as `Searches.single_keys` gives them.

    Args:
        keys: ``[kv_heads * context, head_size]``, those of one KV head after those of another.
        first_key: int64 ``[parts, searches, 1]`` index of a KV head's first key.
        position: int64 ``[searches, n]`` positions of the keys.
    """
    for first in first_key:
        yield keys.index_select(0, (position + first).flatten()).view(*position.shape, -1)
