"""Why rows run dense: the rule, and its twin on the device over random settings."""

from __future__ import annotations

import random

import pytest
import torch

from tests.step.measured import LLAMA_8B
from vllm_sparse.kernels.decode_roles import LayerContexts, RowSettings
from vllm_sparse.kernels.decode_roles.reference import layer_contexts
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.costs import StepCosts
from vllm_sparse.step.eligibility import (
    DenseReason,
    ScoringRoom,
    longest_dense_seq_len,
    why_decode_is_dense,
    why_prefill_is_dense,
)
from vllm_sparse.step.gpu_table import H200
from vllm_sparse.step.plan import layer_roles

LAYERS = 7


@pytest.mark.parametrize(
    ("min_tokens", "query_tokens", "seq_len", "reason"),
    [
        (644, 256, 900, None),
        (0, 256, 900, None),
        # Tokens before the minimum are dense, and so are the others where they are too few.
        (645, 256, 900, DenseReason.SHORT_PROMPT_CHUNK),
        (644, 900, 900, None),
        (645, 900, 900, DenseReason.SHORT_PROMPT_CHUNK),
        (0, 255, 900, DenseReason.SHORT_PROMPT_CHUNK),
        (900, 256, 900, DenseReason.SHORT_CONTEXT),
        (901, 256, 900, DenseReason.SHORT_CONTEXT),
        (901, 255, 900, DenseReason.SHORT_CONTEXT),
    ],
)
def test_prompt_chunks(min_tokens: int, query_tokens: int, seq_len: int, reason: DenseReason | None) -> None:
    assert FlexPrefill().min_query_tokens == 256
    assert why_prefill_is_dense(FlexPrefill(), min_tokens, query_tokens, seq_len) is reason


@pytest.mark.parametrize(
    ("min_tokens", "seq_len", "speculative", "room", "reason"),
    [
        (0, 129, False, None, None),
        (129, 129, False, 129, None),
        (0, 128, False, None, DenseReason.SHORT_CONTEXT),
        (130, 129, False, None, DenseReason.SHORT_CONTEXT),
        (0, 129, False, 128, DenseReason.NO_ROOM),
        (0, 128, False, 0, DenseReason.SHORT_CONTEXT),
        (0, 129, True, 0, DenseReason.SPECULATIVE),
    ],
)
def test_decode_rows(
    min_tokens: int, seq_len: int, speculative: bool, room: int | None, reason: DenseReason | None
) -> None:
    scoring = None if room is None else ScoringRoom(room)
    assert why_decode_is_dense(Tidal(budget_tokens=128), min_tokens, seq_len, speculative, scoring) is reason


def test_rows_whose_layers_all_went_dense() -> None:
    """They take no room, and shortness is named first."""
    room = ScoringRoom(1000)
    tidal = Tidal(budget_tokens=128)
    assert why_decode_is_dense(tidal, 0, 900, False, room, has_sparse_layers=False) is DenseReason.LOW_RECALL
    assert room.left_tokens == 1000
    assert why_decode_is_dense(tidal, 0, 128, has_sparse_layers=False) is DenseReason.SHORT_CONTEXT
    assert why_prefill_is_dense(FlexPrefill(), 0, 256, 900, has_sparse_layers=False) is DenseReason.LOW_RECALL
    assert why_prefill_is_dense(FlexPrefill(), 0, 255, 900, has_sparse_layers=False) is DenseReason.SHORT_PROMPT_CHUNK


class Never(StepCosts):
    """Costs by which nothing pays."""

    def __init__(self) -> None:
        super().__init__(H200, LLAMA_8B, [])

    def chunk_cost(self, method: PrefillMethod, query_tokens: int, seq_len: int) -> float:
        return 1.3


def test_what_does_not_pay_is_said_last_and_takes_no_room() -> None:
    room = ScoringRoom(1000)
    tidal, flexprefill = Tidal(budget_tokens=128), FlexPrefill()
    assert why_decode_is_dense(tidal, 0, 900, False, room, pays=False) is DenseReason.UNPROFITABLE
    assert room.left_tokens == 1000
    assert why_decode_is_dense(tidal, 0, 128, pays=False) is DenseReason.SHORT_CONTEXT
    assert why_decode_is_dense(tidal, 0, 900, has_sparse_layers=False, pays=False) is DenseReason.LOW_RECALL
    assert why_prefill_is_dense(flexprefill, 0, 256, 900, costs=Never()) is DenseReason.UNPROFITABLE
    assert why_prefill_is_dense(flexprefill, 0, 255, 900, costs=Never()) is DenseReason.SHORT_PROMPT_CHUNK
    assert why_prefill_is_dense(flexprefill, 901, 256, 900, costs=Never()) is DenseReason.SHORT_CONTEXT
    assert why_prefill_is_dense(flexprefill, 0, 256, 900, costs=Never(), most_cost=1.3) is None
    assert why_prefill_is_dense(flexprefill, 0, 256, 900, costs=Never(), most_cost=1.2) is DenseReason.TOO_EXPENSIVE
    assert why_prefill_is_dense(flexprefill, 0, 255, 900, costs=Never(), most_cost=1) is DenseReason.SHORT_PROMPT_CHUNK


def test_reasons_have_their_labels() -> None:
    assert [str(reason) for reason in DenseReason] == [
        "short_context", "short_chunk", "no_room", "speculative", "low_recall", "soft_cap",
        "unprofitable", "too_expensive",
    ]  # fmt: skip
    assert all(reason.sentence for reason in DenseReason)


def test_the_device_decides_the_same() -> None:
    """Methods that score all tokens and such that do not, with room for some rows, for none and for all."""
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    methods: list[BatchDecodeMethod] = [
        Tidal(budget_tokens=200),
        BlockTopk(budget_tokens=96),
        HipDecode(),
        Tidal(budget_tokens=900),
    ]
    numbers = [0, 1, 2, 0]
    for _ in range(60):
        rows = [(draw.randrange(4), draw.choice((0, draw.randrange(3000))), draw.randrange(1, 4000)) for _ in range(9)]
        capacity = draw.choice((0, draw.randrange(20000), 1 << 40))
        room = ScoringRoom(capacity)
        expected = [
            why_decode_is_dense(methods[pick], min_tokens, seq_len, room=room) is None
            for pick, min_tokens, seq_len in rows
        ]

        def integers(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        roles = [[role.number for role in layer_roles(methods[pick], LAYERS)] for pick, _, _ in rows]
        settings = RowSettings(
            integers([numbers[pick] for pick, _, _ in rows]),
            integers([longest_dense_seq_len(methods[pick], min_tokens) for pick, min_tokens, _ in rows]),
            integers([methods[pick].scores_tokens for pick, _, _ in rows]),
            torch.tensor(roles, dtype=torch.int8),
        )
        count = len(rows)
        contexts = LayerContexts(
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(LAYERS, count, dtype=torch.int32),
            torch.zeros(3, count, dtype=torch.int32),
            torch.zeros(3, LAYERS, count, dtype=torch.int32),
            torch.zeros(LAYERS, count, dtype=torch.int32),
        )
        layer_contexts(settings, integers([seq_len for _, _, seq_len in rows]), capacity, contexts)
        # A row is sparse where some layer does not read everything.
        found = (contexts.dense == 0).any(0).tolist()
        assert found == expected, f"seed {seed}"
