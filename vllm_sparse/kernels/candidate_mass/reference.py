"""Attention of sampled queries to listed pages in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.keys import PagedKeys
from vllm_sparse.pages import PageList, page_mask
from vllm_sparse.step.chunks import PromptChunks

# Queries of a query block that vote. On two pretrained models pages chosen by 16 keep .98 to .99 of the far attention
# that those chosen by all 128 keep; matrix products take no fewer rows than 16.
SAMPLED_QUERIES = 16
# Of a page, by whose largest products it is weighed: neighbouring keys in pairs, pairs in turn, which are those that a
# thread of a matrix product holds. So a quarter of a page takes one exponential and no sum (docs/methods.md, dhsa).
KEY_GROUPS = 4
# Less than any mass.
NOT_LISTED = -1.0
# What the kernel keeps of masses until it knows their normalisers; if it is short, query blocks take several launches.
SCRATCH_BYTES = 1 << 29


def kept_masses(pages: int, query_heads: int, kv_heads: int) -> int:
    """Most masses that the kernel keeps of a query block: its heads are padded to a power of two for each KV head."""
    return SAMPLED_QUERIES * (kv_heads << (query_heads // kv_heads - 1).bit_length()) * pages


def sampled_offsets(queries: int) -> list[int]:
    """Queries of a query block that vote, by their place in it: evenly spread, some twice where there are fewer."""
    return [(2 * sample + 1) * queries // (2 * SAMPLED_QUERIES) for sample in range(SAMPLED_QUERIES)]


def largest_of_groups(scores: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """The largest score of each of a page's `KEY_GROUPS` groups of keys.

    Args:
        scores: ``[..., keys]`` of whole pages.
        page_tokens: of a page.

    Returns:
        ``[..., pages, KEY_GROUPS]``.
    """
    grouped = scores.reshape(*scores.shape[:-1], -1, page_tokens // (2 * KEY_GROUPS), KEY_GROUPS, 2)
    return grouped.amax((-3, -1))


def page_masses(
    query: torch.Tensor,
    keys: PagedKeys,
    scale: float,
    query_block_tokens: int,
    page_tokens: int,
    listed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mass of each page, 0 of pages that are not read: softmax over the largest scores of all pages' groups of keys.

    Computes in float64 if the queries are float64, else in float32.

    Args:
        query: as in the public function, as are `keys`, `scale` and `query_block_tokens`.
        page_tokens: of a page.
        listed: bool ``[kv_heads, query_blocks, pages]`` pages that are read; None: all.
    """
    query_tokens, heads, head_size = query.shape
    kv_heads, context = keys.num_kv_heads, keys.seq_len
    dtype = torch.promote_types(query.dtype, torch.float32)
    transposed = keys.read(0, context).to(dtype).transpose(1, 2)
    position = torch.arange(context, device=query.device)
    blocks, pages = -(-query_tokens // query_block_tokens), -(-context // page_tokens)
    mass = torch.zeros(heads, blocks, pages, dtype=dtype, device=query.device)
    for i_block, block in enumerate(torch.split(query, query_block_tokens)):
        sampled = torch.tensor(sampled_offsets(block.shape[0]), device=query.device)
        first = context - query_tokens + i_block * query_block_tokens
        stop = first + block.shape[0]
        reach = -(-stop // page_tokens)
        grouped = block[sampled].to(dtype).transpose(0, 1).reshape(kv_heads, -1, head_size)
        scores = torch.bmm(grouped, transposed[:, :, :stop]).mul_(scale).view(kv_heads, -1, SAMPLED_QUERIES, stop)
        unread = position[:stop] > (first + sampled).unsqueeze(1)
        if listed is not None:
            unread = unread | ~listed[:, i_block, :reach].repeat_interleave(page_tokens, dim=1)[:, None, None, :stop]
        scores = scores.masked_fill_(unread, float("-inf"))
        scores = torch.nn.functional.pad(scores, (0, reach * page_tokens - stop), value=float("-inf"))
        weight = largest_of_groups(scores, page_tokens).flatten(3).softmax(3).sum(2).flatten(0, 1)
        mass[:, i_block, :reach] = weight.view(heads, reach, KEY_GROUPS).sum(2)
    return mass


def candidate_mass(
    query: torch.Tensor, keys: PagedKeys, scale: float, query_block_tokens: int, candidates: PageList
) -> torch.Tensor:
    """Mass of each listed page; arguments as in the public function, dtype as of `page_masses`."""
    kv_heads, page_tokens = keys.num_kv_heads, candidates.page_size_tokens
    blocks, pages = -(-query.shape[0] // query_block_tokens), -(-keys.seq_len // page_tokens)
    listed = page_mask(candidates, pages).view(-1, blocks, pages)
    listed = listed.repeat_interleave(kv_heads // listed.shape[0], dim=0)
    mass = page_masses(query, keys, scale, query_block_tokens, page_tokens, listed)
    return mass.masked_fill_(~listed.repeat_interleave(query.shape[1] // kv_heads, dim=0), NOT_LISTED)


def chunk_mass(chunks: PromptChunks, candidates: PageList) -> torch.Tensor:
    """Mass of the listed pages of prompt chunks; arguments as in the public function."""
    blocks, page_tokens = chunks.blocks, candidates.page_size_tokens
    list_heads = candidates.pages.shape[0] // blocks.blocks
    longest = -(-blocks.longest_seq_len // page_tokens)
    each = []
    for chunk, keys in enumerate(chunks.keys):
        rows, pages = blocks.lists_of(chunk, list_heads), -(-keys.seq_len // page_tokens)
        lists = PageList(candidates.pages[rows, :pages], candidates.kept_tokens[rows], page_tokens)
        mass = candidate_mass(chunks.query_of(chunk), keys, chunks.scale, blocks.query_block_tokens, lists)
        each.append(torch.nn.functional.pad(mass, (0, longest - pages), value=NOT_LISTED))
    return torch.cat(each, dim=1)
