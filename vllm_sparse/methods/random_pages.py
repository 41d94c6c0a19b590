"""Random pages beside the first and the last tokens: a lower bound, which a method that looks at keys has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.kernels.top_tokens import TokenBudget, top_pages, top_tokens
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.baseline import PAGE_TOKENS, DecodeBaseline, PrefillBaseline
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.knobs import KNOBS
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.pages import PageList
from vllm_sparse.step.rows import DecodeRows, RowScores, RowsPlace, TokenLists

# Divides every KV-cache block.
UNIT_TOKENS = 16


@dataclass(frozen=True, config=KNOBS)
class RandomPages(PrefillBaseline):
    """Read random pages up to `density` of what a query block can reach, beside its forced tokens.

    A baseline that looks at no key. A hash of layer, query head, the query block's position and page decides, so two
    runs agree, and neither neighbours nor tensor parallelism change anything.
    """

    name: ClassVar[str] = "random"

    def page_scores(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        """Hashes."""
        context, device = keys.seq_len, query.device
        first_query, _ = query_blocks(query.shape[0], context, self.query_block_tokens, device)
        head = torch.arange(query.shape[1], device=device).view(-1, 1, 1) + layer.first_query_head
        page = torch.arange(-(-context // PAGE_TOKENS), device=device)
        return hashed(layer.index, head, first_query.unsqueeze(1), page)


@dataclass(frozen=True, config=KNOBS)
class RandomDecode(DecodeBaseline):
    """Read random pages of 16 tokens up to `budget_tokens` in each layer, beside the first and the last tokens.

    A baseline that looks at no key. A hash of layer, KV head and page decides, so that a list stays the same from step
    to step, but for a page where the recent tokens begin in another one. With tensor parallelism KV heads are those of
    one rank. Where the executor's pages do not divide 16 tokens, they are chosen instead.
    """

    name: ClassVar[str] = "random"

    @property
    def unit_tokens(self) -> int:
        return UNIT_TOKENS

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        unit = page_size_tokens if UNIT_TOKENS % page_size_tokens else UNIT_TOKENS
        scores = _unit_scores(memory.layer, keys.num_kv_heads, -(-keys.seq_len // unit), query.device)
        budget = TokenBudget(self.budget_tokens, self.sink_tokens, self.recent_tokens)
        return top_pages(scores, keys.seq_len, unit, page_size_tokens, budget)

    def choose_rows(self, rows: DecodeRows, knobs: torch.Tensor, place: RowsPlace, lists: TokenLists) -> None:
        _, kv_heads, block_size, _ = rows.kv_cache.shape
        units = rows.block_table.shape[1] * block_size // UNIT_TOKENS
        # All rows have the same.
        values = _unit_scores(place.layer, kv_heads, units, rows.query.device)
        top_tokens(RowScores(values, torch.zeros_like(place.starts), units, UNIT_TOKENS), rows, knobs, lists)


def _unit_scores(layer: int, kv_heads: int, units: int, device: torch.device) -> torch.Tensor:
    """float32 ``[kv_heads, units]``."""
    return hashed(layer, torch.arange(kv_heads, device=device).unsqueeze(1), torch.arange(units, device=device))


def hashed(seed: int, *numbers: torch.Tensor) -> torch.Tensor:
    """Numbers of 0 to 1 that look random, and are the same on every device.

    Args:
        seed: not negative.
        numbers: int64, not negative and below 2^31, of shapes that broadcast.

    Returns:
        float32 of the shape that they broadcast to, multiples of 2^-24.
    """
    state = torch.full((), seed + 1, dtype=torch.int64, device=numbers[0].device)
    for number in numbers:
        # Two rounds of a multiplicative hash of 32 bits; the products stay below 2^63.
        state = (state * 0x2C1B3C6D + number) & 0xFFFFFFFF
        for _ in range(2):
            state = ((state >> 16) ^ state) * 0x45D9F3B & 0xFFFFFFFF
        state = (state >> 16) ^ state
    return (state >> 8).float() / (1 << 24)
