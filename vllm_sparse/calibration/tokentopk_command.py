"""``vllm-sparse calibrate tokentopk MODEL``: find the layers that may read the list of the layer before them.

The model answers questions about real texts densely, and is then told its answers while it decodes by lists. First each
layer alone reuses the list of the layer before it; then layers join the set from the one that changed least on, and
those stay out with which next tokens change more than the bounds allow. The budget whose set costs least is written, as
settings of a server whose `methods` name tokentopk: --additional-config's object `sparse.tokentopk`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from vllm_sparse.calibration.tokentopk_lists import coded_lists
from vllm_sparse.methods.token_topk import TokenTopk

# On a real checkpoint a set found within 0.0007 nats lost answers (docs/methods.md).
MOST_DIVERGENCE, LEAST_SAME = 0.0005, 0.98
BUDGETS = (1024, 2048)
# Bytes of a token's code, of those of its key and value.
CODE_SHARE = 1 / 16
HEADER = """
| budget | layers that reuse a list | KL | same | cost |  |
|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Told:
    """What decoding with a set of reusing layers changes.

    Attributes:
        method: with the set.
        divergence: Kullback-Leibler divergence of the next token from dense decoding's, nats, mean over tokens.
        same: share of tokens with dense decoding's most likely one.
        cost: modelled, share of dense decoding's.
    """

    method: TokenTopk
    divergence: float
    same: float
    cost: float

    def row(self, verdict: str) -> str:
        """Of the Markdown table under `HEADER`."""
        layers = " ".join(map(str, self.method.reuse_layers)) or "none"
        numbers = f"{self.divergence:.5f} | {self.same:.3f} | {self.cost:.3f}"
        return f"| {self.method.budget_tokens} | {layers} | {numbers} | {verdict} |"


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = _parser()
    given = parser.parse_args(arguments)
    _, layers = config_and_layers(parser, given.model)
    check_dense_layers(parser, given.dense_layers, layers)
    check_bounds(parser, given, "same")
    methods = methods_of(
        parser, given.budgets, lambda tokens: TokenTopk(budget_tokens=tokens, dense_layers=given.dense_layers)
    )
    prompts = calibration_prompts.prompts_of(parser, given)
    check_lengths(parser, prompts, methods[-1].budget_tokens)

    decoder = Decoder(given.model, given.device)
    prefixes = []
    for number, prompt in enumerate(prompts, 1):
        prefixes.append(decoder.prefill(prompt, ANSWER_TOKENS))
        print(f"prompt {number} of {len(prompts)}, {len(prompt)} tokens, is answered", flush=True)
    print(HEADER)
    context_tokens = given.context or max(map(len, prompts))
    found = [best for method in methods for best in _search(method, decoder, prefixes, layers, context_tokens, given)]
    if not found:
        parser.error(
            f"no budget stays within the bounds (--divergence {given.divergence}, --same {given.same}) even where each "
            "layer chooses; give larger --budgets or other bounds"
        )
    _write(given.output, min(found, key=lambda one: one.cost), context_tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-sparse calibrate tokentopk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibration_prompts.add_arguments(parser)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=list(BUDGETS), help="tokens of a list (default %(default)s)"
    )
    parser.add_argument(
        "--dense-layers",
        type=int,
        default=TokenTopk.dense_layers,
        help="first layers, dense; the next one chooses (default %(default)s)",
    )
    add_bounds(parser, MOST_DIVERGENCE, LEAST_SAME)
    parser.add_argument(
        "--context", type=int, help="tokens of context at which the cost is modelled (default: the longest prompt)"
    )
    return parser


def _search(
    method: TokenTopk,
    decoder: Decoder,
    prefixes: Sequence[Prefix],
    layers: int,
    context_tokens: int,
    given: argparse.Namespace,
) -> Iterator[Told]:
    """The largest set found of layers that may reuse lists with a budget; nothing if not even the empty one may."""

    def told(*reuse_layers: int) -> Told:
        return _told(method, reuse_layers, decoder, prefixes, layers, context_tokens)

    def is_within(one: Told) -> bool:
        return bool(one.divergence <= given.divergence and one.same >= given.same)

    kept = told()
    print(kept.row("each layer chooses"), flush=True)
    if not is_within(kept):
        return
    alone = []
    for layer in range(method.dense_layers + 1, layers):
        alone.append((told(layer), layer))
        print(alone[-1][0].row("alone"), flush=True)
    for _, layer in sorted(alone, key=lambda one: one[0].divergence):
        tried = told(*kept.method.reuse_layers, layer)
        print(tried.row("stays" if is_within(tried) else f"without {layer}"), flush=True)
        if is_within(tried):
            kept = tried
    yield kept


def _told(
    method: TokenTopk,
    reuse_layers: Sequence[int],
    decoder: Decoder,
    prefixes: Sequence[Prefix],
    layers: int,
    context_tokens: int,
) -> Told:
    """Tell all answers with a set."""
    tried = TokenTopk(
        budget_tokens=method.budget_tokens, dense_layers=method.dense_layers, reuse_layers=tuple(reuse_layers)
    )
    roles = tried.layer_roles(layers)
    divergence, same = told_means(decoder, prefixes, lambda: RoleLists(roles, partial(coded_lists, tried)))
    return Told(tried, divergence, same, modelled_cost(roles, tried.budget_tokens, context_tokens, CODE_SHARE))


def _write(output: Path, chosen: Told, context_tokens: int) -> None:
    """Write the settings, and say what they are."""
    method = chosen.method
    settings = {
        "budget_tokens": method.budget_tokens,
        "dense_layers": method.dense_layers,
        "reuse_layers": list(method.reuse_layers),
    }
    output.write_text(json.dumps({"sparse": {"tokentopk": settings}}, indent=1) + "\n")
    print(
        f"\n{output}: budget {method.budget_tokens}, {len(method.reuse_layers)} layers reuse a list; "
        f"KL {chosen.divergence:.5f}, modelled cost {chosen.cost:.3f} of dense decoding's at {context_tokens} tokens"
    )
