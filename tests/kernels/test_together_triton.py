"""Prompt chunks that choose together by the kernels of a GPU, interpreted, get the lists that each gets alone."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import CAN_RUN, DEVICE, as_on_a_gpu, run_under_the_interpreter
from tests.methods.together import differing_lists, random_step, select_alone, select_together
from tests.oracle import PLAIN
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.sale import Sale

pytest.importorskip("triton")

SIZES = [(140, 300), (1, 129), (230, 600), (64, 64)]
METHODS: dict[str, PrefillMethod] = {
    "flexprefill": FlexPrefill(gamma=0.5, min_budget_tokens=0),
    "flexprefill, pooled": FlexPrefill(
        gamma=0.4, divergence_threshold=1.0, min_budget_tokens=0, query_block_tokens=64, list_per="kv_head"
    ),
    "flexprefill, stretches": FlexPrefill(gamma=0.5, min_budget_tokens=0, sample_every_tokens=512),
    "flexprefill, stretches, pooled": FlexPrefill(
        gamma=0.4,
        divergence_threshold=1.0,
        min_budget_tokens=0,
        query_block_tokens=64,
        list_per="kv_head",
        sample_every_tokens=512,
    ),
    "hip": Hip(
        (64, 16), (192, 64), (4, 1), sink_tokens=16, recent_tokens=40, dense_tail_tokens=1, query_block_tokens=64
    ),
    "hip, scores per query head": Hip(
        (64, 32, 16),
        (256, 64, 48),
        (64, 4, 2),
        sink_tokens=0,
        recent_tokens=0,
        dense_tail_tokens=0,
        scores_per="query_head",
    ),
    "hip, scores and means of all heads": Hip(
        (32, 16), (96, 96), (2, 2), sink_tokens=20, recent_tokens=17, scores_per="layer", list_per="query_head"
    ),
    "sale": Sale(tau=0.3, recent_tokens=64),
    "sale, 128 rows": Sale(tau=0.3, bits=4, query_block_tokens=128, list_per="kv_head", page_bounds=False),
}


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=2 * len(METHODS))


@pytest.mark.skipif(not CAN_RUN or DEVICE != "cpu", reason="in a process of its own: test_under_the_interpreter")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (7, 1)])
def test_chunks_together_get_what_each_gets_alone(
    name: str, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    step = random_step(PLAIN, generator, SIZES, heads, kv_heads)
    as_on_a_gpu(monkeypatch)
    together, alone = (select(METHODS[name], step, 64) for select in (select_together, select_alone))
    for size, found, wanted in zip(SIZES, together, alone, strict=True):
        assert differing_lists(found, wanted) == 0, f"{size}"
