"""What a request's methods keep of a prompt, layer by layer, and how much of the true attention that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vllm_sparse.keys import plain_keys
from vllm_sparse.methods.decode import DecodeMethod, LayerMemory
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.pages import page_mask
from vllm_sparse.step.eligibility import why_prefill_is_dense
from vllm_sparse.step.roles import Role

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
    """

    index: int
    role: Role | Literal["sparse"]
    heads: list[KeptMap]


@dataclass(frozen=True)
class PromptInspection:
    """What a prefill method keeps.

    Attributes:
        method: the method.
        min_tokens: chunks whose context is shorter run dense.
        chunk_tokens: the prompt is computed in chunks of this size, a multiple of the method's query block.
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
        listed = self._listed(index, query, key, scale)
        heads, tokens, _ = query.shape
        block, page = self.method.query_block_tokens, self.method.page_tokens
        first_key = torch.arange(listed.shape[2], device=query.device) * page
        candidates = torch.stack(
            [
                (torch.arange(start + 1, min(start + block, tokens) + 1, device=query.device).unsqueeze(1) - first_key)
                .clamp(0, page)
                .sum(0)
                .double()
                for start in range(0, tokens, block)
            ]
        )
        mass = _block_mass(query, key, scale, block, page) if self.true_attention else None
        sizes = _block_sums(torch.ones(tokens, 1, dtype=torch.double, device=query.device), block)
        maps = []
        for head in range(heads):
            kept = listed[head * len(listed) // heads].double()
            head_mass = None if mass is None else mass[head]
            maps.append(_kept_map(kept, candidates, head_mass, sizes))
        return KeptLayer(index, "sparse", maps)

    def _listed(self, index: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """Pages that each query block reads, some perhaps of the future: bool ``[lists' heads, blocks, pages]``."""
        heads, tokens, _ = query.shape
        having = self.method.list_heads(heads, key.shape[0])
        page = self.method.page_tokens
        pages = -(-tokens // page)
        found = []
        for start, stop in self.chunks(tokens):
            blocks = -(-(stop - start) // self.method.query_block_tokens)
            if self.runs_dense(start, stop):
                found.append(torch.ones(having, blocks, pages, dtype=torch.bool, device=query.device))
                continue
            chunk = query[:, start:stop].transpose(0, 1)
            lists = self.method.select(chunk, plain_keys(key[:, :stop]), scale, page, Layer(index, 0))
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
        heads, tokens, head_size = query.shape
        newest = query[:, -1]
        if role.writes_list:
            chosen = self.method.select(newest, plain_keys(key), scale, 1, LayerMemory())
            self.lists = page_mask(chosen, tokens)
        if role is Role.DENSE or self.lists is None:
            return KeptLayer(index, role, [])
        logits = newest.view(key.shape[0], -1, head_size).float() @ key.float().transpose(1, 2) * scale
        mass = logits.softmax(2).flatten(0, 1).double()
        candidates = torch.ones(1, tokens, dtype=torch.double, device=query.device)
        maps = []
        for head in range(heads):
            kept = self.lists[head * len(self.lists) // heads].double().unsqueeze(0)
            maps.append(_kept_map(kept, candidates, mass[head].unsqueeze(0), candidates[:, :1]))
        return KeptLayer(index, role, maps)


def _block_sums(values: torch.Tensor, block: int) -> torch.Tensor:
    """Sums over blocks of rows, the last of which may be short: ``[ceil(rows / block), columns]``."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % block))
    return padded.view(-1, block, values.shape[1]).sum(1)


def _block_mass(query: torch.Tensor, key: torch.Tensor, scale: float, block: int, page: int) -> torch.Tensor:
    """True attention of each query block to each page, summed over its queries: double ``[heads, blocks, pages]``."""
    heads, tokens, head_size = query.shape
    pages = -(-tokens // page)
    transposed = key.float().transpose(1, 2)
    position = torch.arange(tokens, device=query.device)
    found = []
    for start in range(0, tokens, block):
        rows = position[start : start + block]
        stop = start + len(rows)
        grouped = query[:, start:stop].reshape(key.shape[0], -1, head_size).float()
        logits = (grouped @ transposed[..., :stop] * scale).view(heads, len(rows), stop)
        weight = logits.masked_fill(position[:stop] > rows.unsqueeze(1), float("-inf")).softmax(2)
        padded = torch.nn.functional.pad(weight.double().sum(1), (0, pages * page - stop))
        found.append(padded.view(heads, pages, page).sum(2))
    return torch.stack(found, dim=1)


def _kept_map(kept: torch.Tensor, candidates: torch.Tensor, mass: torch.Tensor | None, sizes: torch.Tensor) -> KeptMap:
    """A head's map, shrunk to a picture's size.

    Args:
        kept: double ``[blocks, pages]``, 1 for pages that are read, else 0.
        candidates: likewise, tokens in reach, summed over the queries of a block.
        mass: likewise, true attention, summed over the queries of a block.
        sizes: ``[blocks, 1]`` queries of each block.
    """
    read = kept * candidates
    of_rows, of_columns = (-(-length // MOST_CELLS) for length in read.shape)

    def shrunk(values: torch.Tensor) -> torch.Tensor:
        return _block_sums(_block_sums(values, of_rows).T, of_columns).T

    share = (shrunk(read) / shrunk(candidates)).float().cpu()
    density = float(read.sum() / candidates.sum())
    if mass is None:
        return KeptMap(share, None, None, density, None)
    queries = _block_sums(sizes, of_rows)
    kept_mass, missed_mass = ((shrunk(part) / queries).float().cpu() for part in (mass * kept, mass * (1 - kept)))
    return KeptMap(share, kept_mass, missed_mass, density, float((mass * kept).sum() / sizes.sum()))
