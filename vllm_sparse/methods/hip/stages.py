"""The stages of HiP's search: knobs of both phases, and what they have to meet together."""

from __future__ import annotations

import itertools
from typing import Annotated

from pydantic import Field

from vllm_sparse.kernels.hierarchical_descent import LEAF_TOKENS
from vllm_sparse.methods.knobs import LIMITED_BUDGET, LIMITED_STAGES, UNBOUNDED_TOKENS, KnobError

Integers = tuple[Annotated[int, Field(strict=True)], ...]
# Knobs of both phases.
StageBlockTokens = Annotated[
    Integers,
    Field(description="tokens of a key block in each stage, falling powers of two of 16 or more", strict=False),
    LIMITED_STAGES,
]
StageBudgetTokens = Annotated[
    Integers,
    Field(description="tokens that each stage keeps, not rising, multiples of its key block", strict=False),
    LIMITED_BUDGET,
]
DEFAULT_STAGE_BLOCK_TOKENS = (256, 64, 16)
DEFAULT_STAGE_BUDGET_TOKENS = (32768, 8192, 2048)


def check_stages(stage_block_tokens: Integers, stage_budget_tokens: Integers) -> None:
    """Check the stages of a search.

    Raises:
        KnobError: there are none, or they do not follow one another.
    """
    if not stage_block_tokens:
        raise KnobError("stage_block_tokens", [], "at least one stage is needed")
    check_one_each("stage_budget_tokens", stage_budget_tokens, stage_block_tokens)
    check_powers_of_two("stage_block_tokens", stage_block_tokens, LEAF_TOKENS, UNBOUNDED_TOKENS)
    if any(length <= shorter for length, shorter in itertools.pairwise(stage_block_tokens)):
        raise KnobError("stage_block_tokens", list(stage_block_tokens), "each must be below the one before it")
    check_not_rising("stage_budget_tokens", stage_budget_tokens)
    for tokens, length in zip(stage_budget_tokens, stage_block_tokens, strict=True):
        if not length <= tokens <= UNBOUNDED_TOKENS or tokens % length:
            raise KnobError(
                "stage_budget_tokens",
                list(stage_budget_tokens),
                f"multiples of the key block, here {length}, up to {UNBOUNDED_TOKENS} are allowed",
            )


def check_one_each(knob: str, values: Integers, stage_block_tokens: Integers) -> None:
    """Check that a knob has a number for each stage.

    Raises:
        KnobError: it has more or less.
    """
    if len(values) != len(stage_block_tokens):
        raise KnobError(knob, list(values), f"one number for each of the {len(stage_block_tokens)} stages is needed")


def check_powers_of_two(knob: str, values: Integers, least: int, most: int) -> None:
    """Check the numbers of a knob.

    Raises:
        KnobError: one is no power of two, or out of range.
    """
    if not all(least <= value <= most and value.bit_count() == 1 for value in values):
        raise KnobError(knob, list(values), f"powers of two from {least} to {most} are allowed")


def check_not_rising(knob: str, values: Integers) -> None:
    """Check that the numbers of a knob fall or stay from stage to stage.

    Raises:
        KnobError: one is above the one before it.
    """
    if any(value < following for value, following in itertools.pairwise(values)):
        raise KnobError(knob, list(values), "none may be above the one before it")
