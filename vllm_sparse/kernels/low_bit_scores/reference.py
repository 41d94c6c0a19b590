"""SALE's selection in PyTorch: the specification, on any device.

SALE (arXiv 2505.24179, sections 3.1 and 3.2) scores every key by few-bit integers and compares each score with the
attention that the same row gives to the sink and its local window. Three things are this project's: a page's mean is
removed from its keys, a page may be decided before its keys are scored, and scores have a margin for rounding.

Here a row is one query of one head, as in the paper.

Scores are laid out ``[keys, rows]``. So the keys of a page are whole rows of a matrix, which are cheap to gather
however few they are, and a maximum over keys never crosses a vector register.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vllm_sparse.kernels.page_list.reference import query_blocks
from vllm_sparse.keys import PagedKeys
from vllm_sparse.step.chunks import PromptChunks

PAGE_TOKENS = 32
# The keys j of a page with equal (j mod 8) // 2 share a scale; so do the queries r and r + 8 of 16 rows.
KEY_GROUPS = 4
ROW_TILE = 16
# Least scale, so that a group of zeros is not divided by zero.
TINY = 1e-30
# Allowances for float32 rounding: relative to the norms of a dot product of up to 256 channels, and absolute, in nats.
ROUNDING = 2.0**-14
ROUNDING_NATS = 1e-4

# Work of one pass over each loop. So little that on a CPU its numbers stay in the cache.
READ_TOKENS = 8192
NEAR_BLOCKS = 16
SCORED_ROWS = 512
SCORED_PAGES = 64


@dataclass(frozen=True)
class LowBitScoring:
    """How `kept_maps` scores keys, and what it keeps unscored.

    Attributes:
        bits: of the integers, 8 or 4.
        page_bounds: decide a page without scoring its keys where the mean key alone does: keep it if the mean scores
            enough, drop it if even the key farthest from the mean cannot.
        sink_tokens: first tokens of the context, always kept; a multiple of 32, at least 32.
        local_tokens: least number of tokens in the local window, which ends with the query block and is always kept;
            rounded up to whole pages.
        query_block_tokens: query tokens that share a selection, 64 or 128.
    """

    bits: int
    page_bounds: bool
    sink_tokens: int
    local_tokens: int
    query_block_tokens: int


@dataclass(frozen=True)
class QuantisedKeys:
    """Whole pages of keys as integers, the mean that was removed from them, and their largest errors.

    Attributes:
        levels: int8 ``[kv_heads, pages, 4, 8, head_size]``, the keys of each group of a page adjacent in memory.
        scale: float32 ``[kv_heads, pages, 4]`` value of one level in each group.
        mean: ``[kv_heads, pages, head_size]`` the page's mean key, rounded to the cache's dtype and then removed.
        radius: float32 ``[kv_heads, pages]`` largest norm of a key less `mean`.
        error: float32 ``[kv_heads, pages]`` largest norm of a key's error from rounding to levels, taken as 0 for 4
            bits. Both norms include the allowance for float32.
    """

    levels: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor
    radius: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class QuantisedQueries:
    """Queries as integers.

    Attributes:
        levels: int8 ``[heads, rows, head_size]``.
        scale: float32 ``[heads, rows]`` value of one level.
        norm: float32 ``[heads, rows]`` norm of each query.
        error: float32 ``[heads, rows]`` norm of the error of rounding to levels; 0 for 4 bits.
    """

    levels: torch.Tensor
    scale: torch.Tensor
    norm: torch.Tensor
    error: torch.Tensor


def top_level(bits: int) -> int:
    """Largest level; levels are the integers from its negative to it."""
    return (1 << (bits - 1)) - 1


def _to_levels(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Nearest integers, halves rounded up, in float32."""
    return values.div(scale).add_(0.5).floor_()


def quantise_keys(keys: PagedKeys, pages: int, bits: int) -> QuantisedKeys:
    """Quantise the first pages of a request's keys, all of which must be full.

    Args:
        keys: the request's keys.
        pages: number of pages; at least 1.
        bits: 4 or 8.
    """
    parts = []
    for start in range(0, pages * PAGE_TOKENS, READ_TOKENS):
        tile = keys.read(start, min(start + READ_TOKENS, pages * PAGE_TOKENS))
        tile = tile.unflatten(1, (-1, PAGE_TOKENS))  # type: ignore[no-untyped-call]
        mean = tile.float().mean(2).to(tile.dtype)
        rest = tile.float() - mean.float().unsqueeze(2)
        # Key 8a + 2g + b of a page is member 2a + b of group g.
        grouped = rest.view(*rest.shape[:2], 4, KEY_GROUPS, 2, -1).transpose(2, 3).flatten(3, 4)
        scale = grouped.abs().amax((3, 4)).div_(top_level(bits)).clamp_(min=TINY)
        levels = _to_levels(grouped, scale[..., None, None])
        radius = grouped.norm(dim=4).amax((2, 3))
        rounding = (mean.float().norm(dim=2) + radius) * ROUNDING
        error = rounding
        if bits == 8:
            error = rounding + (grouped - levels * scale[..., None, None]).norm(dim=4).amax((2, 3))
        parts.append((levels.to(torch.int8), scale, mean, radius + rounding, error))
    return QuantisedKeys(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def quantise_queries(query: torch.Tensor, bits: int) -> QuantisedQueries:
    """Quantise float32 queries ``[heads, rows, head_size]``, the first of which begins a query block.

    A shorter last tile of 16 rows is filled up with zeros, which change no scale.
    """
    heads, rows, head_size = query.shape
    padded = torch.nn.functional.pad(query, (0, 0, 0, -rows % ROW_TILE))
    pairs = padded.view(heads, -1, 2, ROW_TILE // 2, head_size)
    largest = pairs.abs().amax((2, 4)).unsqueeze(2).expand(-1, -1, 2, -1)
    scale = largest.reshape(heads, -1)[:, :rows].div(top_level(bits)).clamp_(min=TINY)
    levels = _to_levels(query, scale.unsqueeze(2))
    error = (query - levels * scale.unsqueeze(2)).norm(dim=2) if bits == 8 else torch.zeros_like(scale)
    return QuantisedQueries(levels.to(torch.int8), scale, query.norm(dim=2), error)


def local_starts(
    query_tokens: int, context: int, local_tokens: int, query_block_tokens: int, device: torch.device
) -> torch.Tensor:
    """First page of each query block's local window, which ends with the block's own positions: int64 ``[blocks]``."""
    first, last = query_blocks(query_tokens, context, query_block_tokens, device)
    return torch.minimum((last + 1 - local_tokens).clamp(min=0), first) // PAGE_TOKENS


def middle_end(query_tokens: int, context: int, local_tokens: int, query_block_tokens: int) -> int:
    """The largest of `local_starts`, that of the last query block: only pages before it may be scored."""
    first = context - query_tokens + (query_tokens - 1) // query_block_tokens * query_block_tokens
    return min(max(context - local_tokens, 0), first) // PAGE_TOKENS


def thresholds(
    query: torch.Tensor, keys: PagedKeys, scale: float, log_tau: torch.Tensor, scoring: LowBitScoring
) -> torch.Tensor:
    """Least score with which a key holds tau of a row's attention to the sink and the local window.

    Arguments as of `kept_map`, but `query` is float32 ``[query_heads, query_tokens, head_size]``.

    Returns:
        float32 ``[query_heads, query_tokens]``: ``m + log(tau * l)``, less the allowance for float32 rounding.
    """
    local_tokens, query_block_tokens = scoring.local_tokens, scoring.query_block_tokens
    heads, query_tokens, head_size = query.shape
    kv_heads, context = keys.num_kv_heads, keys.seq_len
    device = query.device
    sink = keys.read(0, min(scoring.sink_tokens, context)).float()
    sink_key = torch.arange(sink.shape[1], device=device)
    window_key = torch.arange(max(local_tokens, query_block_tokens) + PAGE_TOKENS, device=device)
    parts = []
    for begin in range(0, query_tokens, NEAR_BLOCKS * query_block_tokens):
        rows = query[:, begin : begin + NEAR_BLOCKS * query_block_tokens]
        # These rows see as many tokens as if the prompt chunk ended with them.
        seen = context - query_tokens + begin + rows.shape[1]
        starts = local_starts(rows.shape[1], seen, local_tokens, query_block_tokens, device).unsqueeze(1) * PAGE_TOKENS
        blocks, low = starts.shape[0], int(starts[0])
        near = torch.cat([sink, keys.read(low, seen).float()], dim=1)
        local_key = starts + window_key
        index = (local_key - low).clamp(max=seen - low - 1) + sink.shape[1]
        near = near[:, torch.cat([sink_key.expand(blocks, -1), index], dim=1)]
        padded = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % query_block_tokens))
        # [kv_heads, blocks, group, query_block, head_size]
        grouped = padded.view(kv_heads, -1, blocks, query_block_tokens, head_size).transpose(1, 2)
        scores = torch.matmul(grouped.flatten(2, 3), near.transpose(2, 3)).mul_(scale).view(*grouped.shape[:4], -1)
        position = seen - rows.shape[1] + torch.arange(blocks * query_block_tokens, device=device).view(blocks, -1, 1)
        hidden = torch.cat(
            [(sink_key >= starts).unsqueeze(1).expand(-1, query_block_tokens, -1), local_key.unsqueeze(1) > position],
            dim=2,
        )
        scores.masked_fill_(hidden.unsqueeze(1), float("-inf"))
        slack = grouped.norm(dim=4) * near.norm(dim=3).amax(2)[:, :, None, None] * (scale * ROUNDING)
        parts.append((scores.logsumexp(4) - slack).transpose(1, 2).reshape(heads, -1)[:, : rows.shape[1]])
    return torch.cat(parts, dim=1) + (log_tau.unsqueeze(1) - ROUNDING_NATS)


@functools.cache
def _multiplies_integers() -> bool:
    """Whether this CPU's int8 products are exact. Without dot-product instructions they may saturate at 16 bits."""
    # Every pair of signs: libraries make one side unsigned by an offset, so that only some of the pairs saturate.
    signs = torch.tensor([127, -127], dtype=torch.int8).repeat(16)
    left, right = signs.unsqueeze(1).repeat(1, 64), signs.repeat(64, 1)
    return torch.equal(torch._int_mm(left, right).long(), left.long() @ right.long())


def integer_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Exact product of int8 matrices, in int32 or in float32, which represents all integers that can occur."""
    if left.is_cuda or not _multiplies_integers():
        return torch.mm(left.float(), right.float())
    return torch._int_mm(left, right)


def kept_map(
    query: torch.Tensor, keys: PagedKeys, scale: float, log_tau: torch.Tensor, scoring: LowBitScoring
) -> torch.Tensor:
    """Select pages of one prompt chunk.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of a prompt chunk, at the last positions of the context.
        keys: the request's keys, those of the prompt chunk included.
        scale: softmax scale of the model.
        log_tau: as in the public function.
        scoring: likewise.

    Returns:
        bool ``[query_heads, ceil(query_tokens / query_block_tokens), ceil(context / 32)]``.
    """
    query_block_tokens = scoring.query_block_tokens
    query_tokens, heads, _ = query.shape
    device = query.device
    rows = query.transpose(0, 1).float()
    starts = local_starts(query_tokens, keys.seq_len, scoring.local_tokens, query_block_tokens, device)
    sink_pages = scoring.sink_tokens // PAGE_TOKENS
    page = torch.arange(-(-keys.seq_len // PAGE_TOKENS), device=device)
    near = (page < sink_pages) | (page >= starts.unsqueeze(1))
    kept = near.repeat(heads, 1, 1)
    pages = middle_end(query_tokens, keys.seq_len, scoring.local_tokens, query_block_tokens)
    if pages <= sink_pages:
        return kept
    least = thresholds(rows, keys, scale, log_tau, scoring)
    quantised = quantise_keys(keys, pages, scoring.bits)
    tile_blocks = SCORED_ROWS // query_block_tokens
    for begin in range(0, starts.shape[0], tile_blocks):
        blocks = slice(begin, begin + tile_blocks)
        middle = slice(sink_pages, int(starts[blocks][-1]))
        candidates = ~near[blocks, middle].t()
        if not candidates.numel():
            continue
        tile = slice(begin * query_block_tokens, (begin + tile_blocks) * query_block_tokens)
        past_end = -rows[:, tile].shape[1] % query_block_tokens
        tile_rows = torch.nn.functional.pad(rows[:, tile], (0, 0, 0, past_end))
        tile_least = torch.nn.functional.pad(least[:, tile], (0, past_end), value=float("inf"))
        queries = quantise_queries(tile_rows, scoring.bits)
        for head in range(heads):
            kv_head = head * keys.num_kv_heads // heads
            head_keys = QuantisedKeys(*(part[kv_head, middle] for part in vars(quantised).values()))
            head_queries = QuantisedQueries(*(part[head] for part in vars(queries).values()))
            # Scores of the means, less the threshold of each row.
            above = torch.addmm(-tile_least[head], head_keys.mean.float(), tile_rows[head].t(), alpha=scale)
            kept[head, blocks, middle] |= _passing(
                above, head_keys, head_queries, scale, candidates, scoring.page_bounds
            ).t()
    return kept


def kept_maps(chunks: PromptChunks, log_tau: torch.Tensor, scoring: LowBitScoring) -> torch.Tensor:
    """Select pages of prompt chunks, one after another; arguments and result as in the public function."""
    blocks = chunks.blocks
    shape = chunks.query.shape[1], blocks.blocks, -(-blocks.longest_seq_len // PAGE_TOKENS)
    kept = torch.zeros(shape, dtype=torch.bool, device=chunks.query.device)
    for chunk, keys in enumerate(chunks.keys):
        rows, pages = slice(blocks.starts[chunk], blocks.starts[chunk + 1]), -(-keys.seq_len // PAGE_TOKENS)
        kept[:, rows, :pages] = kept_map(chunks.query_of(chunk), keys, chunks.scale, log_tau, scoring)
    return kept


def _passing(
    above: torch.Tensor,
    keys: QuantisedKeys,
    queries: QuantisedQueries,
    scale: float,
    candidates: torch.Tensor,
    page_bounds: bool,
) -> torch.Tensor:
    """Candidates in which a key scores more than the threshold of some row: bool ``[pages, blocks]``.

    Args:
        above: float32 ``[pages, rows]`` score of each page's mean less the row's threshold.
        keys: the pages of one KV head.
        queries: the rows of one query head.
        scale: softmax scale of the model.
        candidates: bool ``[pages, blocks]`` pages that a query block may still have to keep.
        page_bounds: as in `LowBitScoring`.
    """

    def in_some_row(difference: torch.Tensor) -> torch.Tensor:
        return difference.view(*difference.shape[:1], candidates.shape[1], -1).amax(2) > 0

    kept = torch.zeros_like(candidates)
    undecided = candidates
    if page_bounds:
        # The best key scores at least as much as the mean. At most it scores higher by the norm of the query times the
        # distance of the farthest key from the mean.
        kept = candidates & in_some_row(above)
        highest = torch.addcmul(above, keys.radius.unsqueeze(1), queries.norm, value=scale)
        undecided = candidates & ~kept & in_some_row(highest)
    # The most that rounding to levels may have lowered a score.
    page_margin = torch.stack([keys.error, keys.radius + keys.error], dim=1)
    row_margin = torch.stack([queries.norm, queries.error]) * scale
    levels = keys.levels.flatten(1)
    columns = queries.levels.t().contiguous()
    pages = undecided.any(1).nonzero().squeeze(1)
    for start in range(0, pages.shape[0], SCORED_PAGES):
        part = pages[start : start + SCORED_PAGES]
        products = integer_products(levels.index_select(0, part).view(-1, columns.shape[0]), columns)
        # First the best integer of each group, then its value.
        best = products.view(part.shape[0], KEY_GROUPS, -1, columns.shape[1]).amax(2)
        best = (best * keys.scale[part].unsqueeze(2)).amax(1)
        difference = above.index_select(0, part).addmm_(page_margin[part], row_margin)
        difference.addcmul_(best, queries.scale, value=scale)
        kept[part] |= undecided[part] & in_some_row(difference)
    return kept
