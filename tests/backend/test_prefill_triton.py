"""Steps of several sparse prompt chunks by the kernels of a GPU, interpreted, launch what the reference launches."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.interpreter import CAN_RUN, DEVICE, as_on_a_gpu, run_under_the_interpreter
from vllm_sparse.backend import prefill
from vllm_sparse.backend.layer import LayerCall, LayerPlatform
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.streaming import Streaming
from vllm_sparse.metrics import StepRecord, WorkerMetrics
from vllm_sparse.step.launch import Executor, Launch
from vllm_sparse.step.plan import PrefillRow, RowSpan, StepPlan

pytest.importorskip("triton")

HEADS, KV_HEADS, HEAD_SIZE, BLOCK, SCALE = 4, 2, 32, 64, 0.2
# Tokens of each chunk and its context, and tokens of the first one's prompt, which goes on.
SIZES = [(130, 300), (128, 128), (200, 700)]
PROMPT_TOKENS = [1000, None, None]
# Before the first chunk.
OTHER_TOKENS = 3

METHODS: dict[str, list[PrefillMethod]] = {
    "dhsa": [Dhsa(density=0.3, sink_tokens=0, recent_tokens=0)],
    "dhsa in two stages": [
        Dhsa(density=0.3, sink_tokens=0, recent_tokens=0, bound_weight=0.5, candidate_factor=2, scores_per="kv_head"),
        Dhsa(density=0.5, coverage=0.7),
    ],
    "flexprefill": [FlexPrefill(gamma=0.5, divergence_threshold=0.3, min_budget_tokens=0)],
    "sale": [Sale(tau=0.1)],
    "by query head": [Dhsa(density=0.3), Sale(tau=0.1), FlexPrefill(gamma=0.5, min_budget_tokens=0)],
    "by KV head": [
        Hip(
            stage_block_tokens=(64, 16),
            stage_budget_tokens=(256, 64),
            query_stride=(4, 4),
            sink_tokens=16,
            recent_tokens=32,
        ),
        Streaming(recent_tokens=100),
        Dhsa(density=0.3, list_per="kv_head"),
    ],
}


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=6)


class Noting(Executor):
    """Doubles queries instead of attending."""

    def __init__(self) -> None:
        self.launches: list[tuple[Launch, torch.Tensor]] = []

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        self.launches.append((launch, query))
        torch.mul(query, 2, out=output)


class OneLayer(LayerPlatform):
    """A layer of the CUDA backend, without vLLM's configuration."""

    num_heads, num_kv_heads, scale, first_query_head = HEADS, KV_HEADS, SCALE, 0
    logits_soft_cap = 0.0

    def make_executor(self, layer: Any) -> Noting:
        return Noting()

    def keys_of(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> PagedKeys:
        return PlainKeys(kv_cache, block_table, seq_len)

    def prefill_page_size(self, wanted_tokens: int, block_size_tokens: int) -> int:
        return min(wanted_tokens, block_size_tokens)

    def decode_page_size(self, block_size_tokens: int) -> int:
        raise NotImplementedError

    def dense_subset(self, layer: Any, query: torch.Tensor, metadata: Any, spans: list[RowSpan]) -> Any:
        raise NotImplementedError

    def stock_forward(self, call: LayerCall, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        raise NotImplementedError


def serve(methods: list[PrefillMethod], seed: int) -> list[tuple[Launch, torch.Tensor]]:
    """What a layer launches for chunks that have the methods in turn; checks that outputs come back to their places."""
    generator = torch.Generator().manual_seed(seed)
    width = max(-(-seq_len // BLOCK) for _, seq_len in SIZES)
    table = torch.randperm(len(SIZES) * width, generator=generator).view(len(SIZES), width).int()
    cache = torch.randn(len(SIZES) * width, KV_HEADS, BLOCK, 2 * HEAD_SIZE, generator=generator)
    starts = list(itertools.accumulate((tokens for tokens, _ in SIZES), initial=OTHER_TOKENS))
    query = torch.randn(starts[-1], HEADS + 2, HEAD_SIZE, generator=generator)[:, :HEADS] * 2
    rows = [
        PrefillRow(RowSpan(row, starts[row], *size), method, None, PROMPT_TOKENS[row])
        for row, (size, method) in enumerate(zip(SIZES, itertools.cycle(methods), strict=False))
    ]
    record = StepRecord(
        WorkerMetrics(recording=False), StepPlan(range(1), tuple(row.span for row in rows), prefill=tuple(rows))
    )
    output = torch.zeros(query.shape)
    platform = OneLayer()
    metadata = SimpleNamespace(block_table=table)
    call = LayerCall(None, 0, query, query, query, cache, metadata, output, platform.scale)
    prefill.serve_chunks(platform, call, prefill.plan_launches(platform, call, rows), record)
    assert torch.equal(output[OTHER_TOKENS:], 2 * query[OTHER_TOKENS:]), f"seed {seed}"
    assert not bool(output[:OTHER_TOKENS].any()), f"seed {seed}"
    executor = platform.executor(None)
    assert isinstance(executor, Noting)
    return executor.launches


@pytest.mark.skipif(not CAN_RUN or DEVICE != "cpu", reason="in a process of its own: test_under_the_interpreter")
@pytest.mark.parametrize("name", METHODS)
def test_kernels_launch_what_the_reference_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(1 << 30)
    expected = serve(METHODS[name], seed)
    as_on_a_gpu(monkeypatch)
    found = serve(METHODS[name], seed)
    assert len(found) == len(expected)
    for (launch, query), (wanted, wanted_query) in zip(found, expected, strict=True):
        assert torch.equal(query, wanted_query), f"seed {seed}"
        assert torch.equal(launch.query_starts, wanted.query_starts), f"seed {seed}"
        assert launch.page_size_tokens == wanted.page_size_tokens
        page = torch.arange(wanted.pages.shape[1]) * wanted.page_size_tokens
        live = page < wanted.kept_tokens.unsqueeze(1)
        same = (launch.kept_tokens == wanted.kept_tokens) & (launch.pages * live == wanted.pages * live).all(1)
        # Scores that differ in their last bits may choose another page; a wrong table changes most rows.
        assert float(same.float().mean()) > 0.8, f"seed {seed}"
