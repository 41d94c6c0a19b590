"""``vllm-sparse calibrate tidal MODEL``: find the layers in which TidalDecode should choose, and its budget.

The model answers questions about real texts densely. Every layer's attention says how much of it each earlier layer's
list keeps, with each budget. For every number of choosing layers, those whose lists serve the later layers best are
found; then the model decodes its answers again with these lists, told what to say, and its next tokens are compared
with dense ones. The policy with the smallest modelled cost that stays within the bounds is written. The server loads
the file, budget included: --additional-config '{"sparse": {"tidal": {"policy": "FILE"}}}'.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_sparse.calibration import prompts as calibration_prompts
from vllm_sparse.calibration.decode_search import (
    ANSWER_TOKENS,
    add_bounds,
    check_bounds,
    check_dense_layers,
    check_lengths,
    methods_of,
    modelled_cost,
    told_means,
)
from vllm_sparse.calibration.decoding import Decoder, Prefix, RoleLists
from vllm_sparse.calibration.model import config_and_layers
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.tidal.calibration import (
    ReuseRecall,
    choose_roles,
    lists_of_steps,
    recall_of,
)
from vllm_sparse.methods.tidal.method import DENSE_LAYERS
from vllm_sparse.methods.tidal.policy import Measured, Policy
from vllm_sparse.step.roles import Role

# Bounds of the quality gate (vllm_sparse.quality.gate), and what answers to a few prompts can tell.
MOST_DIVERGENCE, LEAST_SAME = 0.02, 0.98
# A layer that chooses reads its keys once more, of keys and values.
KEYS_SHARE = 1 / 2
BUDGETS = (1024, 2048, 4096)
# Numbers of choosing layers that are tried grow by a third, as costs do.
GROWTH = 4 / 3
HEADER = """
| cost | budget | choosing layers | worst recall | mean recall | kept | KL | same |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Point:
    """One policy of the frontier.

    Attributes:
        method: its budget.
        roles: of each layer.
        recall: of each layer, as of `Measured`.
        kept: attention mass that the lists keep, mean over heads and layers that read one.
        cost: modelled, share of dense decoding's.
        divergence, same: as of `Measured`.
    """

    method: Tidal
    roles: list[Role]
    recall: list[float | None]
    kept: float
    cost: float
    divergence: float = 0.0
    same: float = 1.0

    @property
    def found(self) -> list[float]:
        """Recall of the layers that read a list."""
        return [recall for recall in self.recall if recall is not None]

    @property
    def choosing(self) -> list[int]:
        """Layers that choose."""
        return [layer for layer, role in enumerate(self.roles) if role.writes_list]

    @property
    def row(self) -> str:
        """Of the Markdown table under `HEADER`."""
        numbers = f"{min(self.found):.3f} | {statistics.fmean(self.found):.3f} | {self.kept:.3f}"
        changed = f"{self.divergence:.4f} | {self.same:.3f}"
        layers = " ".join(map(str, self.choosing))
        return f"| {self.cost:.3f} | {self.method.budget_tokens} | {layers} | {numbers} | {changed} |"


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = _parser()
    given = parser.parse_args(arguments)
    config, layers = config_and_layers(parser, given.model)
    check_dense_layers(parser, given.dense_layers, layers)
    most = layers - given.dense_layers - 1
    if given.selections is not None and not 1 <= given.selections <= most:
        parser.error(
            f"--selections {given.selections}: the model has {layers} layers, {given.dense_layers} of them dense, so 1 "
            f"to {most} are allowed"
        )
    check_bounds(parser, given, "same", "recall_floor")
    methods = methods_of(
        parser, given.budgets, lambda tokens: Tidal(budget_tokens=tokens, selection_reads=given.selection_reads)
    )
    prompts = calibration_prompts.prompts_of(parser, given)
    check_lengths(parser, prompts, methods[-1].budget_tokens)

    decoder = Decoder(given.model, given.device)
    reuse = [ReuseRecall(layers, config.num_attention_heads, method) for method in methods]
    prefixes = list(_measured(decoder, prompts, reuse))
    numbers = [given.selections] if given.selections else _spread(most)
    context_tokens = given.context or max(map(len, prompts))
    points = []
    for one in reuse:
        recall, mass = one.recall, one.mass.mean(2).tolist()
        for number in numbers:
            roles = choose_roles(recall, given.dense_layers, number)
            points.append(_point(one.method, roles, recall, mass, context_tokens))
        points.append(_point(one.method, Tidal().layer_roles(layers), recall, mass, context_tokens))
    points.sort(key=lambda point: point.cost)
    print(HEADER)
    told = []
    for point in points:
        told.append(_told(point, decoder, prefixes))
        print(told[-1].row, flush=True)
    chosen = next((point for point in told if _is_within(point, given)), None)
    if chosen is None:
        best = min(told, key=lambda point: point.divergence)
        parser.error(
            f"no policy that leaves a layer sparse stays within the bounds (--divergence {given.divergence}, --same "
            f"{given.same}, --recall-floor {given.recall_floor}); the nearest has {best.divergence:.4f} and "
            f"{best.same:.3f}; give larger --budgets or other bounds"
        )
    measured = Measured(
        given.model,
        chosen.method.budget_tokens,
        chosen.method.sink_tokens,
        chosen.method.recent_tokens,
        chosen.method.list_per,
        [prefix.tokens for prefix in prefixes],
        sum(len(prefix.logits) for prefix in prefixes),
        [None if recall is None else round(recall, 4) for recall in chosen.recall],
        round(chosen.divergence, 5),
        round(chosen.same, 4),
    )
    Policy(chosen.roles, measured, chosen.method.budget_tokens, given.selection_reads).save(given.output)
    print(
        f"\n{given.output}: budget {chosen.method.budget_tokens}, layers "
        f"{', '.join(map(str, chosen.choosing))} choose; modelled cost {chosen.cost:.3f} "
        f"of dense decoding's at {context_tokens} tokens"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-sparse calibrate tidal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    calibration_prompts.add_arguments(parser)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=list(BUDGETS), help="tokens of a list (default %(default)s)"
    )
    parser.add_argument(
        "--dense-layers",
        "--full-layers",
        type=int,
        default=DENSE_LAYERS,
        help="first layers, dense; the next one chooses (default %(default)s)",
    )
    parser.add_argument(
        "--selection-reads",
        choices=("everything", "list"),
        default="list",
        help="what a layer that chooses reads itself; its own list costs a third of everything (default %(default)s)",
    )
    parser.add_argument("--selections", type=int, help="layers that choose (default: as few as stay within the bounds)")
    add_bounds(parser, MOST_DIVERGENCE, LEAST_SAME)
    parser.add_argument(
        "--recall-floor",
        type=float,
        default=0.0,
        help="of the attention that a layer's own list keeps, the share that the list it reads keeps, for the head "
        "that loses most, at least (default %(default)s)",
    )
    parser.add_argument(
        "--context", type=int, help="tokens of context at which the cost is modelled (default: the longest prompt)"
    )
    return parser


def _spread(most: int) -> list[int]:
    """Numbers of choosing layers to try, up to and with the most."""
    numbers = [1]
    while numbers[-1] < most:
        numbers.append(min(max(numbers[-1] + 1, round(numbers[-1] * GROWTH)), most))
    return numbers


def _measured(decoder: Decoder, prompts: Sequence[list[int]], reuse: Sequence[ReuseRecall]) -> Iterator[Prefix]:
    """Prefill each prompt, and see what lists would keep of its answer's attention."""
    for number, prompt in enumerate(prompts, 1):
        begin = time.monotonic()
        prefix = decoder.prefill(prompt, ANSWER_TOKENS)
        for one in reuse:
            decoder.tell(prefix, one)
        print(
            f"prompt {number} of {len(prompts)}, {len(prompt)} tokens: answered with {len(prefix.said)} tokens "
            f"({time.monotonic() - begin:.1f} s)",
            flush=True,
        )
        yield prefix


def _point(
    method: Tidal, roles: list[Role], recall: list[list[float]], mass: list[list[float]], context_tokens: int
) -> Point:
    kept = [share for share in recall_of(roles, mass) if share is not None]
    cost = modelled_cost(method.with_selection_reads(roles), method.budget_tokens, context_tokens, KEYS_SHARE)
    return Point(method, roles, recall_of(roles, recall), statistics.fmean(kept), cost)


def _told(point: Point, decoder: Decoder, prefixes: Sequence[Prefix]) -> Point:
    """The point with what decoding by it changes."""
    roles = point.method.with_selection_reads(point.roles)

    def choose(query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float) -> torch.Tensor:
        return lists_of_steps(point.method, scores)

    divergence, same = told_means(decoder, prefixes, lambda: RoleLists(roles, choose))
    return dataclasses.replace(point, divergence=divergence, same=same)


def _is_within(point: Point, given: argparse.Namespace) -> bool:
    return bool(
        point.divergence <= given.divergence and point.same >= given.same and min(point.found) >= given.recall_floor
    )
