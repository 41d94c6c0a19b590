"""What the searches for a decode method's layers share: checks of their options, the modelled cost, told answers."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

from vllm_sparse.calibration.decoding import Decoder, Lists, Prefix
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.step.roles import Role

# Tokens of an answer, at most: enough to be led astray, few enough that the search takes minutes.
ANSWER_TOKENS = 32

Searched = TypeVar("Searched", bound=DecodeMethod)


def add_bounds(parser: argparse.ArgumentParser, most_divergence: float, least_same: float) -> None:
    """Options ``--divergence`` and ``--same``: how far answers may move from dense decoding's; with their defaults."""
    parser.add_argument(
        "--divergence",
        type=float,
        default=most_divergence,
        help="from dense decoding, nats a token, mean, at most (default %(default)s)",
    )
    parser.add_argument(
        "--same",
        type=float,
        default=least_same,
        help="share of tokens whose likeliest stays dense decoding's, at least (default %(default)s)",
    )


def check_dense_layers(parser: argparse.ArgumentParser, dense_layers: int, layers: int) -> None:
    """End the command unless ``--dense-layers`` leaves a layer that chooses and one after it."""
    if not 0 <= dense_layers <= layers - 2:
        parser.error(f"--dense-layers {dense_layers}: the model has {layers} layers, so 0 to {layers - 2} are allowed")


def check_bounds(parser: argparse.ArgumentParser, given: argparse.Namespace, *shares: str) -> None:
    """End the command where a bound is none: ``divergence``, and the options that are shares."""
    for option in ("divergence", *shares):
        value = getattr(given, option)
        if not value >= 0 or (option != "divergence" and value > 1):
            allowed = "0 or more is" if option == "divergence" else "0 to 1 is"
            parser.error(f"--{option.replace('_', '-')} {value}: {allowed} allowed")


def methods_of(
    parser: argparse.ArgumentParser, budgets: Sequence[int], made: Callable[[int], Searched]
) -> list[Searched]:
    """The method with each of ``--budgets``, smallest first; ends the command where it does not allow one."""
    methods = []
    for budget_tokens in sorted(set(budgets)):
        try:
            methods.append(made(budget_tokens))
        except (ValueError, KnobError) as error:
            parser.error(f"--budgets {budget_tokens}: {error}")
    return methods


def check_lengths(parser: argparse.ArgumentParser, prompts: Sequence[list[int]], budget_tokens: int) -> None:
    """End the command where a prompt is no longer than the largest budget."""
    shortest = min(map(len, prompts))
    if shortest <= budget_tokens:
        parser.error(
            f"--budgets {budget_tokens}: the shortest prompt has {shortest} tokens, and a list must not "
            "hold all of them; give longer prompts or smaller budgets"
        )


def modelled_cost(roles: Sequence[Role], budget_tokens: int, context_tokens: int, choosing_share: float) -> float:
    """Bytes that a decode step's attention reads, of those that dense decoding reads.

    Args:
        roles: of each layer.
        budget_tokens: of a list.
        context_tokens: of the request.
        choosing_share: what a layer that chooses reads beside its attention, of its keys and values.
    """
    listed = min(budget_tokens / context_tokens, 1)
    return sum((listed if role.reads_list else 1) + role.writes_list * choosing_share for role in roles) / len(roles)


def told_means(decoder: Decoder, prefixes: Sequence[Prefix], lists: Callable[[], Lists]) -> tuple[float, float]:
    """Tell all answers by lists, made anew for each; prompts count by the tokens of their answers.

    Returns:
        Divergence from dense decoding, nats a token, and the share of tokens whose likeliest stays.
    """
    told = [decoder.tell(prefix, lists()) for prefix in prefixes]
    tokens = [len(prefix.logits) for prefix in prefixes]
    return (
        statistics.fmean((one.divergence for one in told), tokens),
        statistics.fmean((one.same for one in told), tokens),
    )
