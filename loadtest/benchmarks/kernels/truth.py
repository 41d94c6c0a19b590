"""What a chunk truly attends to, and the selection that knows it: the upper bound of every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loadtest.benchmarks.kernels.batch import DecodeBatch
from loadtest.benchmarks.kernels.heads import Heads
from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.prefill import Layer, PrefillMethod, mean_reach
from vllm_sparse.pages import PageList, page_mask
from vllm_sparse.step.launch import Launch

# The finest granularity that any method chooses with.
KEY_BLOCK_TOKENS = 16
QUERY_BLOCK_TOKENS = 64
TILE_BYTES = 1 << 28


def block_mass(heads: Heads) -> torch.Tensor:
    """Attention mass of each block of 64 queries on each block of 16 keys, summed over the queries.

    Returns:
        float32 ``[query_heads, ceil(chunk / 64), ceil(context / 16)]``.
    """
    chunk, query_heads, _ = heads.query.shape
    context, group = heads.context, query_heads // heads.keys.shape[0]
    tile = max(TILE_BYTES // (4 * context) // QUERY_BLOCK_TOKENS, 1) * QUERY_BLOCK_TOKENS
    padding = -context % KEY_BLOCK_TOKENS
    positions = torch.arange(context, device=heads.query.device)
    masses = []
    for head in range(query_heads):
        keys = heads.keys[head // group].float()
        rows = []
        for start in range(0, chunk, tile):
            query = heads.query[start : start + tile, head].float()
            scores = (query @ keys.T).mul_(heads.scale)
            last = context - chunk + start + torch.arange(query.shape[0], device=query.device)
            scores.masked_fill_(positions > last.unsqueeze(1), float("-inf"))
            mass = torch.nn.functional.pad(scores.softmax(-1), (0, padding))
            mass = mass.view(query.shape[0], -1, KEY_BLOCK_TOKENS).sum(2)
            mass = torch.nn.functional.pad(mass, (0, 0, 0, -query.shape[0] % QUERY_BLOCK_TOKENS))
            rows.append(mass.view(-1, QUERY_BLOCK_TOKENS, mass.shape[1]).sum(1))
        masses.append(torch.cat(rows))
    return torch.stack(masses)


def kept_blocks(lists: PageList, context: int) -> torch.Tensor:
    """Lists as a map: bool ``[rows, ceil(context / 16)]``; a finer page than 16 tokens counts as its block."""
    kept = page_mask(lists, -(-context // lists.page_size_tokens))
    blocks = kept.repeat_interleave(lists.page_size_tokens // KEY_BLOCK_TOKENS, dim=1)
    return blocks[:, : -(-context // KEY_BLOCK_TOKENS)]


def recall(mass: torch.Tensor, lists: PageList, query_block: int, chunk: int, context: int) -> float:
    """Share of the chunk's attention that its lists hold.

    Args:
        mass: from `block_mass`.
        lists: of the chunk, for all query heads or for all KV heads.
        query_block: query tokens that share a list.
        chunk: query tokens.
        context: tokens of the context.
    """
    query_heads, blocks, _ = mass.shape
    per_list = query_block // QUERY_BLOCK_TOKENS
    kept = kept_blocks(lists, context)
    kept = kept.view(-1, -(-chunk // query_block), kept.shape[1])
    kept = kept.repeat_interleave(query_heads // kept.shape[0], dim=0).repeat_interleave(per_list, dim=1)[:, :blocks]
    return float((mass * kept).sum() / (chunk * query_heads))


def kept_tokens_of(batch: DecodeBatch, launch: Launch, row: int) -> torch.Tensor:
    """Tokens of a row that its lists hold, found through the block table: bool ``[lists, context]``.

    Raises:
        ValueError: a list names a page of another row or another head, or one beyond the context.
    """
    blocks, kv_heads, block_size, _ = batch.kv_cache.shape
    page_size = launch.page_size_tokens
    lists = len(launch.kept_tokens) // batch.rows
    mine = slice(row * lists, (row + 1) * lists)
    pages, kept_tokens = launch.pages[mine].long(), launch.kept_tokens[mine].long()
    device = pages.device
    context = batch.seq_lens[row]
    used = -(-context // block_size)
    logical = torch.full((blocks,), -1, device=device)
    logical[batch.block_table[row, :used].long()] = torch.arange(used, device=device)
    pages_per_block = block_size // page_size
    page_starts = torch.arange(pages.shape[1], device=device) * page_size
    offsets = torch.arange(page_size, device=device)
    head = pages // pages_per_block % kv_heads
    block = logical[pages // (pages_per_block * kv_heads)]
    token = (block * block_size + pages % pages_per_block * page_size).unsqueeze(2) + offsets
    live = page_starts.unsqueeze(1) + offsets < kept_tokens.view(-1, 1, 1)
    owner = torch.arange(lists, device=device) // (lists // kv_heads)
    wrong = (head != owner.unsqueeze(1)) | (block < 0)
    if bool((live & (wrong.unsqueeze(2) | (token >= context))).any()):
        raise ValueError(f"a list of row {row} names a token of another row or head, or one beyond its context")
    kept = torch.zeros(lists, context + 1, dtype=torch.bool, device=device)
    kept.scatter_(1, torch.where(live, token, context).flatten(1), True)
    return kept[:, :context]


def kept_mass(batch: DecodeBatch, launch: Launch) -> float:
    """Share of the rows' attention that their lists hold, mean over rows and query heads."""
    kv_heads, _, head_size = batch.heads.keys.shape
    total = 0.0
    for row, context in enumerate(batch.seq_lens):
        query = batch.query[row].view(kv_heads, -1, head_size).float()
        scores = query @ batch.heads.keys[:, :context].float().transpose(1, 2) * batch.heads.scale
        weight = scores.softmax(-1).flatten(0, 1)
        kept = kept_tokens_of(batch, launch, row)
        total += float((weight * kept.repeat_interleave(len(weight) // len(kept), dim=0)).sum() / len(weight))
    return total / batch.rows


@dataclass(frozen=True)
class TrueMass(PrefillMethod):
    """Keeps the blocks of 32 keys that hold most of the true attention, over all heads and query blocks of a layer.

    Attributes:
        mass: from `block_mass`, of the very chunk that is selected for.
        density: share of the candidate blocks to keep.
    """

    name: ClassVar[str] = "true mass"
    page_tokens: ClassVar[int] = 32
    mass: torch.Tensor
    density: float
    dense_layers: int = 0
    query_block_tokens: int = 64
    list_per: str = "query_head"

    @property
    def exactly_dense(self) -> bool:
        return self.density >= 1

    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        return self.density * mean_reach(query_tokens, seq_len)

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        halves = torch.nn.functional.pad(self.mass, (0, self.mass.shape[2] % 2))
        mass = halves.view(*halves.shape[:2], -1, 2).sum(3)
        _, last = query_blocks(query.shape[0], keys.seq_len, self.query_block_tokens, query.device)
        candidate = torch.arange(mass.shape[2], device=query.device) * self.page_tokens <= last.unsqueeze(1)
        count = max(round(float(candidate.sum()) * mass.shape[0] * self.density), 1)
        threshold = mass.masked_fill(~candidate, -1.0).flatten().topk(count).values[-1]
        return (mass >= threshold) & candidate
