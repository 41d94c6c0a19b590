"""What a request's methods keep of a prompt, layer by layer, and how much of the true attention that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vllm_sparse.kernels.block_mass import block_mass
from vllm_sparse.keys import plain_keys
from vllm_sparse.methods.decode import DecodeMethod, LayerMemory
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.pages import page_mask
from vllm_sparse.step.eligibility import dense_first_tokens, why_prefill_is_dense
from vllm_sparse.step.roles import Role

# Tokens of a prompt chunk are a multiple of this, which every query block divides.
CHUNK_UNIT_TOKENS = 128
# Cells of a map along a side, so that the map of a long prompt stays a picture.
MOST_CELLS = 256


@dataclass(frozen=True)
class KeptMap:
    """What one head kept, over the part of the prompt that it could reach.

    Attributes:
        share: float32 ``[rows, columns]`` share of a cell's tokens in reach that were read; NaN where none is in reach.
        kept_mass: likewise, true attention to the tokens that were read, mean over the cell's queries; None where the
            true attention was not computed.
        missed_mass: likewise, to those that were not.
        density: tokens read over tokens in reach.
        recall: true attention kept, mean over queries; None where it was not computed.
    """

    share: torch.Tensor
    kept_mass: torch.Tensor | None
    missed_mass: torch.Tensor | None
    density: float
    recall: float | None


@dataclass(frozen=True)
class KeptLayer:
    """What a layer kept.

    Attributes:
        index: of the layer.
        role: ``sparse`` or `Role.DENSE` in a prompt, as of `DecodeMethod.layer_roles` in a decode step.
        heads: one map per query head; none where no list is read or written.
        cell_tokens: keys of a map's cell.
    """

    index: int
    role: Role | Literal["sparse"]
    heads: list[KeptMap]
    cell_tokens: int = 1


@dataclass(frozen=True)
class PromptInspection:
    """What a prefill method keeps.

    Attributes:
        method: the method.
        min_tokens: tokens before this run dense, up to the query block that holds it.
        chunk_tokens: the prompt is computed in chunks of this size, a multiple of `CHUNK_UNIT_TOKENS`.
        true_attention: compute it.
    """

    method: PrefillMethod
    min_tokens: int
    chunk_tokens: int
    true_attention: bool

    def runs_dense(self, start: int, stop: int) -> bool:
        """Whether the chunk of tokens `start` to ``stop - 1`` runs dense for its length."""
        return why_prefill_is_dense(self.method, self.min_tokens, stop - start, stop) is not None

    def chunks(self, tokens: int) -> list[tuple[int, int]]:
        """First token of each chunk of a prompt, and the one after its last."""
        return [(start, min(start + self.chunk_tokens, tokens)) for start in range(0, tokens, self.chunk_tokens)]

    def observe(self, index: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> KeptLayer:
        """What a layer keeps.

        Args:
            index: of the layer.
            query: ``[query_heads, tokens, head_size]``, rotary positions applied.
            key: ``[kv_heads, tokens, head_size]``, likewise.
            scale: softmax scale.
        """
        if index < self.method.dense_layers:
            return KeptLayer(index, Role.DENSE, [])
        listed = self.listed(index, query, key, scale)
        heads, tokens, _ = query.shape
        block, page = self.method.query_block_tokens, self.method.page_tokens
        candidates = tokens_in_reach(tokens, block, page, query.device)
        mass = None
        if self.true_attention:
            mass = block_mass(query.transpose(0, 1), plain_keys(key), scale, block, page).double()
        sizes = _block_sums(torch.ones(tokens, 1, dtype=torch.double, device=query.device), block)
        maps = []
        for head in range(heads):
            kept = listed[head * len(listed) // heads].double()
            head_mass = None if mass is None else mass[head]
            maps.append(_kept_map(kept, candidates, head_mass, sizes))
        return KeptLayer(index, "sparse", maps, _per_cell(candidates.shape[1]) * page)

    def listed(self, index: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """Pages that each query block reads in a sparse layer, some perhaps of the future; arguments as in `observe`.

        Returns:
            bool ``[lists' heads, blocks, pages]``.
        """
        heads, tokens, _ = query.shape
        having = self.method.list_heads(heads, key.shape[0])
        page = self.method.page_tokens
        pages = -(-tokens // page)
        found = []
        for start, stop in self.chunks(tokens):
            block = self.method.query_block_tokens
            blocks = -(-(stop - start) // block)
            dense_tokens = dense_first_tokens(self.min_tokens, stop - start, stop)
            dense_blocks = blocks if self.runs_dense(start, stop) else -(-dense_tokens // block)
            if dense_blocks:
                found.append(torch.ones(having, dense_blocks, pages, dtype=torch.bool, device=query.device))
            if dense_blocks == blocks:
                continue
            blocks -= dense_blocks
            chunk = query[:, start + dense_blocks * block : stop].transpose(0, 1)
            lists = self.method.select(chunk, plain_keys(key[:, :stop]), scale, page, Layer(index, 0, tokens))
            found.append(page_mask(lists, pages).view(having, blocks, pages))
        return torch.cat(found, dim=1)


@dataclass
class DecodeInspection:
    """What a decode method keeps for the prompt's last token, as if it had just been generated.

    Attributes:
        method: the method.
        roles: of the layers.
        lists: chosen last: bool ``[lists' heads, tokens]``.
    """

    method: DecodeMethod
    roles: list[Role]
    lists: torch.Tensor | None = None

    def observe(self, index: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> KeptLayer:
        """What a layer keeps or chooses for others; layers come in order. Arguments as in `PromptInspection`."""
        role = self.roles[index]
        heads, tokens, _ = query.shape
        self.choose(index, query, key, scale)
        if role is Role.DENSE or self.lists is None:
            return KeptLayer(index, role, [])
        mass = newest_mass(query, key, scale)
        candidates = torch.ones(1, tokens, dtype=torch.double, device=query.device)
        maps = []
        for head in range(heads):
            kept = self.lists[head * len(self.lists) // heads].double().unsqueeze(0)
            maps.append(_kept_map(kept, candidates, mass[head].unsqueeze(0), candidates[:, :1]))
        return KeptLayer(index, role, maps, _per_cell(tokens))

    def choose(self, index: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Let a layer write its list, if it writes one; layers come in order. Arguments as in `PromptInspection`."""
        if self.roles[index].writes_list:
            chosen = self.method.select(query[:, -1], plain_keys(key), scale, 1, LayerMemory(layer=index))
            self.lists = page_mask(chosen, key.shape[1])


def newest_mass(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """True attention of the last query: double ``[heads, tokens]``. Arguments as in `PromptInspection`."""
    grouped = query[:, -1].view(key.shape[0], -1, query.shape[2])
    logits = grouped.float() @ key.float().transpose(1, 2) * scale
    return logits.softmax(2).flatten(0, 1).double()


def tokens_in_reach(tokens: int, block: int, page: int, device: torch.device) -> torch.Tensor:
    """Tokens of each page that the queries of each block of a prompt can reach, summed over the block's queries.

    Args:
        tokens: of the prompt.
        block: query tokens of a block.
        page: tokens of a page.
        device: of the result.

    Returns:
        double ``[blocks, pages]``.
    """
    first_key = torch.arange(0, tokens, page, device=device)
    return torch.stack(
        [
            (torch.arange(start + 1, min(start + block, tokens) + 1, device=device).unsqueeze(1) - first_key)
            .clamp(0, page)
            .sum(0)
            .double()
            for start in range(0, tokens, block)
        ]
    )


def _block_sums(values: torch.Tensor, block: int) -> torch.Tensor:
    """Sums over blocks of rows, the last of which may be short: ``[ceil(rows / block), columns]``."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % block))
    return padded.view(-1, block, values.shape[1]).sum(1)


def _per_cell(length: int) -> int:
    """Rows or columns that a cell of a picture holds."""
    return -(-length // MOST_CELLS)


def _kept_map(kept: torch.Tensor, candidates: torch.Tensor, mass: torch.Tensor | None, sizes: torch.Tensor) -> KeptMap:
    """A head's map, shrunk to a picture's size.

    Args:
        kept: double ``[blocks, pages]``, 1 for pages that are read, else 0.
        candidates: likewise, tokens in reach, summed over the queries of a block.
        mass: likewise, true attention, summed over the queries of a block.
        sizes: ``[blocks, 1]`` queries of each block.
    """
    read = kept * candidates
    of_rows, of_columns = map(_per_cell, read.shape)

    def shrunk(values: torch.Tensor) -> torch.Tensor:
        return _block_sums(_block_sums(values, of_rows).T, of_columns).T

    share = (shrunk(read) / shrunk(candidates)).float().cpu()
    density = float(read.sum() / candidates.sum())
    if mass is None:
        return KeptMap(share, None, None, density, None)
    queries = _block_sums(sizes, of_rows)
    kept_mass, missed_mass = ((shrunk(part) / queries).float().cpu() for part in (mass * kept, mass * (1 - kept)))
    return KeptMap(share, kept_mass, missed_mass, density, float((mass * kept).sum() / sizes.sum()))
