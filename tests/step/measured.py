"""Decode steps of loadtest/RESULTS.md on an H200: Llama-3.1-8B's geometry, in CUDA graphs, all rows by one method."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.token_topk import TokenTopk
from vllm_sparse.step.costs import AttentionShape

LLAMA_8B = AttentionShape(32, 32, 8, 128, 4096, 436e6)
QWEN_HALF_B = AttentionShape(24, 14, 2, 64, 512, 30e6)


class Cell(NamedTuple):
    """A line of a table: requests, tokens of each, method, milliseconds of a step dense and sparse.

    Attributes:
        configured: the method as the server's configuration set it, whose launches graphs hold; None: as in the line.
    """

    rows: int
    seq_len: int
    method: BatchDecodeMethod
    dense_ms: float
    sparse_ms: float
    configured: BatchDecodeMethod | None = None

    @property
    def in_graphs(self) -> BatchDecodeMethod:
        """The method whose launches graphs hold."""
        return self.configured or self.method


def tidal(budget_tokens: int) -> Tidal:
    """As these runs had it."""
    return Tidal(budget_tokens=budget_tokens, reselect_layers=(13,), selection_reads="list")


TOKENTOPK = TokenTopk(page_tokens=128, dense_layers=2)
ONE_OF_TWO = replace(TOKENTOPK, reuse_layers=tuple(range(3, 32, 2)))
TWO_OF_THREE = replace(TOKENTOPK, reuse_layers=tuple(layer for layer in range(3, 32) if layer % 3 != 2))
# As a server's configuration, so that graphs launch no choice in these layers.
NONE_DENSE = replace(ONE_OF_TWO, dense_layers=0)

CELLS = [
    Cell(1, 8192, tidal(4096), 5.18, 5.24),
    Cell(1, 8192, BlockTopk(budget_tokens=4096), 5.18, 6.19),
    Cell(1, 8192, tidal(2048), 5.23, 5.16),
    Cell(1, 8192, HipDecode(), 5.23, 5.58),
    Cell(1, 8192, BlockTopk(budget_tokens=4096), 5.23, 6.08),
    Cell(24, 32768, tidal(2048), 31.51, 9.66),
    Cell(24, 32768, HipDecode(), 31.51, 10.05),
    Cell(24, 32768, BlockTopk(budget_tokens=4096), 31.51, 13.69),
    Cell(1, 131072, tidal(4096), 8.88, 5.68),
    Cell(1, 131072, tidal(2048), 8.98, 5.60),
    Cell(1, 131072, Tidal(reselect_layers=(13,), selection_reads="everything"), 8.85, 5.82),
    Cell(1, 131072, HipDecode(), 8.98, 5.64),
    Cell(1, 131072, BlockTopk(budget_tokens=4096), 8.88, 6.76),
    Cell(1, 131072, BlockTopk(), 9.16, 6.76),
    Cell(1, 16384, TokenTopk(page_tokens=128), 5.30, 5.77),
    Cell(1, 32768, TOKENTOPK, 5.96, 6.06),
    Cell(1, 32768, TOKENTOPK, 5.97, 5.98),
    Cell(1, 32768, ONE_OF_TWO, 5.97, 6.09, TOKENTOPK),
    Cell(1, 131072, TOKENTOPK, 8.96, 7.02),
    Cell(1, 131072, TOKENTOPK, 8.96, 6.94),
    Cell(1, 131072, ONE_OF_TWO, 8.96, 6.66, TOKENTOPK),
    Cell(1, 131072, TWO_OF_THREE, 8.96, 6.43, TOKENTOPK),
    Cell(6, 131072, TOKENTOPK, 37.27, 12.26),
    Cell(6, 131072, ONE_OF_TWO, 37.27, 10.59, TOKENTOPK),
    Cell(6, 131072, TWO_OF_THREE, 37.27, 9.79, TOKENTOPK),
    Cell(1, 131072, NONE_DENSE, 8.98, 6.12),
    Cell(6, 131072, NONE_DENSE, 37.10, 8.68),
    Cell(24, 32768, TOKENTOPK, 31.29, 13.13),
    Cell(24, 32768, ONE_OF_TWO, 31.29, 11.60, TOKENTOPK),
    Cell(24, 32768, TWO_OF_THREE, 31.29, 10.82, TOKENTOPK),
    Cell(6, 131072, tidal(4096), 36.87, 9.37),
    Cell(6, 131072, BlockTopk(budget_tokens=4096), 36.87, 11.57),
    Cell(1, 524288, tidal(2048), 20.71, 7.09),
    Cell(1, 524288, BlockTopk(budget_tokens=4096), 20.71, 8.90),
    Cell(1, 524288, HipDecode(), 20.70, 5.89),
]
# Slower than dense or than predicted, which no other cell explains; what the table's margin and doubt are for.
NOT_UNDERSTOOD = [
    Cell(1, 524288, TokenTopk(page_tokens=128), 20.72, 10.40),
    Cell(1, 32768, Tidal(reselect_layers=(13,), selection_reads="everything"), 5.90, 6.79),
    Cell(1, 32768, Tidal(reselect_layers=(13,), selection_reads="everything"), 6.04, 6.49),
]
