"""The methods that the shared tests run over: each method enters with several settings, in one line each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.oracle import Oracle, OracleDecode
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.random_pages import RandomDecode, RandomPages
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.streaming import Streaming, StreamingDecode
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.token_topk import TokenTopk


@dataclass(frozen=True)
class PrefillCase:
    """A prefill method with settings.

    Attributes:
        name: test id.
        method: the instance.
        keeps_sink: it promises the first page to every row.
    """

    name: str
    method: PrefillMethod
    keeps_sink: bool = True


@dataclass(frozen=True)
class DecodeCase:
    """A decode method with settings.

    Attributes:
        name: test id.
        method: the instance.
        sink_tokens: first tokens that it promises.
        recent_tokens: last tokens that it promises, the newest included.
        lists_per_kv_head: rows of a list, as a function of the group size: 1, or 0 for one row per query head.
        unit_tokens: granularity of the choice.
        choice_tokens: what it chooses at a time, each of which may take a coarser page of its own; None if it chooses
            pages.
        slack_tokens: by how much rounding may leave a list of single tokens below its budget.
    """

    name: str
    method: DecodeMethod
    sink_tokens: int
    recent_tokens: int
    lists_per_kv_head: int = 1
    unit_tokens: int = 1
    choice_tokens: int | None = None
    slack_tokens: int = 0


PREFILL = [
    PrefillCase("flex-default", FlexPrefill()),
    PrefillCase("flex-sparse", FlexPrefill(gamma=0.3, min_budget_tokens=0)),
    PrefillCase("flex-sparse-lines-only", FlexPrefill(gamma=0.5, divergence_threshold=0.0, min_budget_tokens=128)),
    PrefillCase("flex-pooled-only", FlexPrefill(gamma=0.4, divergence_threshold=1.0, min_budget_tokens=0)),
    PrefillCase("flex-capped", FlexPrefill(gamma=0.99, min_budget_tokens=0, max_budget_tokens=256)),
    PrefillCase("flex-faithful", FlexPrefill(gamma=0.5, min_budget_tokens=256, faithful=True)),
    PrefillCase(
        "flex-faithful-pooled", FlexPrefill(gamma=0.5, divergence_threshold=1.0, min_budget_tokens=0, faithful=True)
    ),
    PrefillCase("flex-dense", FlexPrefill(gamma=1.0)),
    PrefillCase("flex-64", FlexPrefill(gamma=0.4, min_budget_tokens=128, query_block_tokens=64)),
    PrefillCase(
        "flex-64-pooled",
        FlexPrefill(gamma=0.4, divergence_threshold=1.0, min_budget_tokens=0, query_block_tokens=64, faithful=True),
    ),
    PrefillCase("flex-kv-head", FlexPrefill(gamma=0.4, min_budget_tokens=128, list_per="kv_head")),
    PrefillCase("flex-stretches", FlexPrefill(gamma=0.4, min_budget_tokens=128, sample_every_tokens=512)),
    PrefillCase(
        "flex-stretches-pooled",
        FlexPrefill(
            gamma=0.4,
            divergence_threshold=1.0,
            min_budget_tokens=0,
            query_block_tokens=64,
            list_per="kv_head",
            sample_every_tokens=640,
        ),
    ),
    PrefillCase("dhsa-default", Dhsa()),
    PrefillCase(
        "dhsa-16", Dhsa(key_block_tokens=16, budget_tokens=288, sink_tokens=20, recent_tokens=40, dense_tail_tokens=0)
    ),
    PrefillCase(
        "dhsa-layer",
        Dhsa(key_block_tokens=128, density=0.4, scores_per="layer", list_per="kv_head", dense_tail_tokens=1),
    ),
    PrefillCase(
        "dhsa-adaptive",
        Dhsa(
            key_blocks="adaptive",
            bound_weight=0.0,
            budget_tokens=200,
            sink_tokens=0,
            recent_tokens=0,
            scores_per="kv_head",
            query_block_tokens=64,
            dense_tail_tokens=16,
        ),
        keeps_sink=False,
    ),
    PrefillCase("dhsa-bounds", Dhsa(bound_weight=1.0, key_block_tokens=64, dense_tail_tokens=0)),
    PrefillCase("dhsa-two-stages", Dhsa(bound_weight=0.5, candidate_factor=4.0, sink_tokens=32, recent_tokens=64)),
    PrefillCase(
        "dhsa-two-stages-layer",
        Dhsa(candidate_factor=1.5, budget_tokens=250, scores_per="layer", query_block_tokens=64, dense_tail_tokens=0),
    ),
    PrefillCase("sale-sparse", Sale(tau=0.25)),
    PrefillCase("sale-4-bits", Sale(tau=0.25, bits=4, page_bounds=False)),
    PrefillCase(
        "sale-kv-head-128", Sale(tau=0.3, sink_tokens=64, recent_tokens=0, query_block_tokens=128, list_per="kv_head")
    ),
    PrefillCase("hip-default", Hip()),
    PrefillCase(
        "hip-small",
        Hip(
            stage_block_tokens=(64, 16),
            stage_budget_tokens=(256, 96),
            query_stride=(4, 1),
            sink_tokens=20,
            recent_tokens=40,
            scores_per="query_head",
        ),
    ),
    PrefillCase(
        "hip-layer",
        Hip(
            stage_block_tokens=(32,),
            stage_budget_tokens=(160,),
            query_stride=(2,),
            sink_tokens=0,
            recent_tokens=0,
            dense_tail_tokens=0,
            scores_per="layer",
            query_block_tokens=128,
            list_per="query_head",
        ),
        keeps_sink=False,
    ),
    PrefillCase("streaming-default", Streaming()),
    PrefillCase("streaming-small", Streaming(recent_tokens=200)),
    PrefillCase("streaming-odd", Streaming(sink_tokens=37, recent_tokens=1, query_block_tokens=64)),
    PrefillCase("streaming-window", Streaming(sink_tokens=0, recent_tokens=100, list_per="query_head"), False),
    PrefillCase("random-default", RandomPages()),
    PrefillCase(
        "random-64", RandomPages(density=0.4, sink_tokens=0, recent_tokens=37, query_block_tokens=64), keeps_sink=False
    ),
    PrefillCase("oracle-default", Oracle()),
    PrefillCase("oracle-kv-head", Oracle(density=0.3, sink_tokens=20, recent_tokens=0, list_per="kv_head")),
]
PREFILL_DENSE = [
    PrefillCase("flex-gamma-1", FlexPrefill(gamma=1.0)),
    PrefillCase("flex-gamma-1-faithful", FlexPrefill(gamma=1.0, faithful=True)),
    PrefillCase("flex-min-budget", FlexPrefill(gamma=0.1, divergence_threshold=0.0, min_budget_tokens=1 << 24)),
    PrefillCase(
        "flex-min-budget-stretches",
        FlexPrefill(gamma=0.1, divergence_threshold=0.0, min_budget_tokens=1 << 24, sample_every_tokens=512),
    ),
    PrefillCase("dhsa-density-1", Dhsa(density=1.0, sink_tokens=0, recent_tokens=0, dense_tail_tokens=0)),
    PrefillCase(
        "dhsa-two-stages",
        Dhsa(density=1.0, bound_weight=0.5, candidate_factor=2.0, sink_tokens=0, recent_tokens=0, dense_tail_tokens=0),
    ),
    PrefillCase(
        "dhsa-budget",
        Dhsa(
            key_blocks="adaptive",
            bound_weight=0.0,
            budget_tokens=700,
            scores_per="layer",
            list_per="kv_head",
            dense_tail_tokens=0,
        ),
    ),
    PrefillCase(
        "hip-tokens",
        Hip(
            stage_block_tokens=(64, 16),
            stage_budget_tokens=(704, 704),
            query_stride=(4, 1),
            sink_tokens=0,
            recent_tokens=0,
            dense_tail_tokens=0,
        ),
    ),
    PrefillCase("sale-tau-0", Sale(tau=0.0)),
    PrefillCase("streaming-window", Streaming(sink_tokens=20, recent_tokens=680)),
    PrefillCase("random-density-1", RandomPages(density=1.0, sink_tokens=0, recent_tokens=0)),
    PrefillCase("oracle-density-1", Oracle(density=1.0, sink_tokens=0, recent_tokens=0)),
]
DECODE = [
    DecodeCase("tidal-default", Tidal(), 16, 64),
    DecodeCase("tidal-small", Tidal(budget_tokens=128), 16, 64),
    DecodeCase("tidal-query-head", Tidal(budget_tokens=96, list_per="query_head"), 16, 64, 0),
    DecodeCase("tidal-nothing-forced", Tidal(budget_tokens=64, sink_tokens=0, recent_tokens=0), 0, 1),
    DecodeCase("tidal-odd-forced", Tidal(budget_tokens=200, sink_tokens=5, recent_tokens=129), 5, 129),
    DecodeCase("tidal-all-forced", Tidal(budget_tokens=160, sink_tokens=80, recent_tokens=80), 80, 80),
    DecodeCase(
        "tidal-minimum", Tidal(budget_tokens=16, sink_tokens=0, recent_tokens=3, list_per="query_head"), 0, 3, 0
    ),
    DecodeCase("blocktopk-default", BlockTopk(), 16, 64, unit_tokens=16),
    DecodeCase("blocktopk-mean", BlockTopk(budget_tokens=160, scores="mean"), 16, 64, unit_tokens=16),
    DecodeCase(
        "blocktopk-32",
        BlockTopk(budget_tokens=96, page_tokens=32, scores="mean", sink_tokens=0, recent_tokens=0),
        0,
        1,
        unit_tokens=32,
    ),
    DecodeCase(
        "blocktopk-64",
        BlockTopk(budget_tokens=200, page_tokens=64, sink_tokens=5, recent_tokens=129),
        5,
        129,
        unit_tokens=64,
    ),
    DecodeCase(
        "blocktopk-all-forced", BlockTopk(budget_tokens=160, sink_tokens=80, recent_tokens=80), 80, 80, unit_tokens=16
    ),
    DecodeCase("blocktopk-candidates", BlockTopk(budget_tokens=160, candidate_factor=4), 16, 64),
    DecodeCase(
        "blocktopk-candidates-mean",
        BlockTopk(
            budget_tokens=72,
            page_tokens=64,
            scores="mean",
            candidate_factor=3,
            coverage=0.9,
            sink_tokens=5,
            recent_tokens=0,
        ),
        5,
        1,
        slack_tokens=66,
    ),
    DecodeCase(
        "blocktopk-coverage",
        BlockTopk(budget_tokens=200, coverage=0.5, sink_tokens=0, recent_tokens=3),
        0,
        3,
        unit_tokens=16,
        slack_tokens=196,
    ),
    DecodeCase("tokentopk-default", TokenTopk(), 16, 64),
    DecodeCase("tokentopk-small", TokenTopk(budget_tokens=128, page_tokens=16), 16, 64),
    DecodeCase("tokentopk-reuse", TokenTopk(budget_tokens=128, reuse_layers=(3, 5, 6)), 16, 64),
    DecodeCase("tokentopk-nothing-forced", TokenTopk(budget_tokens=64, sink_tokens=0, recent_tokens=0), 0, 1),
    DecodeCase("tokentopk-all-forced", TokenTopk(budget_tokens=160, sink_tokens=80, recent_tokens=80), 80, 80),
    DecodeCase("hip-default", HipDecode(), 256, 1025, choice_tokens=16, slack_tokens=300),
    DecodeCase(
        "hip-small",
        HipDecode(
            stage_block_tokens=(64, 16),
            stage_budget_tokens=(256, 96),
            refresh_steps=(5, 2),
            sink_tokens=20,
            recent_tokens=40,
        ),
        20,
        41,
        choice_tokens=16,
        slack_tokens=97,
    ),
    DecodeCase(
        "hip-nothing-forced",
        HipDecode(
            stage_block_tokens=(32,), stage_budget_tokens=(160,), refresh_steps=(1,), sink_tokens=0, recent_tokens=0
        ),
        0,
        1,
        choice_tokens=16,
        slack_tokens=61,
    ),
    DecodeCase("streaming-default", StreamingDecode(), 4, 4096),
    DecodeCase("streaming-small", StreamingDecode(recent_tokens=100), 4, 100),
    DecodeCase("streaming-odd", StreamingDecode(sink_tokens=37, recent_tokens=1), 37, 1),
    DecodeCase("random-default", RandomDecode(), 16, 64, unit_tokens=16),
    DecodeCase("random-odd", RandomDecode(budget_tokens=200, sink_tokens=5, recent_tokens=129), 5, 129, unit_tokens=16),
    DecodeCase("oracle-default", OracleDecode(), 16, 64),
    DecodeCase("oracle-nothing-forced", OracleDecode(budget_tokens=64, sink_tokens=0, recent_tokens=0), 0, 1),
]
DECODE_DENSE = [
    DecodeCase("tidal-budget", Tidal(budget_tokens=1 << 24), 16, 64),
    DecodeCase("tidal-budget-query-head", Tidal(budget_tokens=1 << 24, list_per="query_head"), 16, 64, 0),
    DecodeCase("blocktopk-budget", BlockTopk(budget_tokens=1 << 24), 16, 64, unit_tokens=16),
    DecodeCase("blocktopk-budget-candidates", BlockTopk(budget_tokens=1000, candidate_factor=2), 16, 64),
    DecodeCase(
        "blocktopk-budget-mean", BlockTopk(budget_tokens=1000, page_tokens=64, scores="mean"), 16, 64, unit_tokens=64
    ),
    DecodeCase("tokentopk-budget", TokenTopk(budget_tokens=1 << 24), 16, 64),
    DecodeCase(
        "hip-tokens",
        HipDecode(stage_block_tokens=(64, 16), stage_budget_tokens=(1024, 1024), sink_tokens=0, recent_tokens=0),
        0,
        1,
    ),
    DecodeCase(
        "hip-forced",
        HipDecode(stage_block_tokens=(16,), stage_budget_tokens=(16,), sink_tokens=500, recent_tokens=500),
        500,
        501,
    ),
    DecodeCase("streaming-window", StreamingDecode(sink_tokens=0, recent_tokens=1000), 0, 1000),
    DecodeCase("random-budget", RandomDecode(budget_tokens=1000), 16, 64, unit_tokens=16),
    DecodeCase("oracle-budget", OracleDecode(budget_tokens=1000), 16, 64),
]

prefill_cases = pytest.mark.parametrize("case", PREFILL, ids=lambda case: case.name)
decode_cases = pytest.mark.parametrize("case", DECODE, ids=lambda case: case.name)
