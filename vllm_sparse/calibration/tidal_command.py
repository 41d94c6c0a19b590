"""``vllm-sparse calibrate tidal MODEL``: find the layers in which TidalDecode should choose its lists.

The model runs over a few prompts with dense attention. At the last tokens of each, every layer's list is chosen as in
decoding, and every later layer's attention says how much of it that list keeps: of what the layer's own list would
keep, for the head that loses most. The policy that maximises the worst layer's recall (then the mean) is written. The
server loads the file: --additional-config '{"sparse": {"tidal": {"policy": "FILE"}}}'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from vllm_sparse.calibration import prompts as calibration_prompts
from vllm_sparse.calibration.model import observe, text_config
from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.tidal.calibration import ReuseRecall, choose_roles, recall_of, worst_recall
from vllm_sparse.methods.tidal.method import PAPER_FULL_LAYERS
from vllm_sparse.methods.tidal.policy import Measured, Policy
from vllm_sparse.step.roles import Role

# Last tokens of a prompt: with the random prompts, the value that is copied out of thousands of pairs.
POSITIONS = 32


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="vllm-sparse calibrate tidal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    calibration_prompts.add_arguments(parser)
    parser.add_argument(
        "--budget", type=int, default=Tidal.budget_tokens, help="tokens of a list (default %(default)s)"
    )
    parser.add_argument(
        "--full-layers",
        type=int,
        default=PAPER_FULL_LAYERS,
        help="first layers, dense; the next one selects (default %(default)s)",
    )
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        "--selections", type=int, default=2, help="layers after them that read everything (default %(default)s)"
    )
    number.add_argument(
        "--recall-floor", type=float, help="instead: as few as bring the worst recall to this, above 0 to 1"
    )
    given = parser.parse_args(arguments)
    config = text_config(given.model)
    layers = config.num_hidden_layers
    first, most = given.full_layers, layers - given.full_layers - 1
    if not 0 <= first <= layers - 2:
        parser.error(f"--full-layers {first}: the model has {layers} layers, so 0 to {layers - 2} are allowed")
    if not 1 <= given.selections <= most:
        parser.error(
            f"--selections {given.selections}: the model has {layers} layers, {first} of them dense, so 1 to {most} "
            "are allowed"
        )
    if given.recall_floor is not None and not 0 < given.recall_floor <= 1:
        parser.error(f"--recall-floor {given.recall_floor}: above 0 to 1 is allowed")
    try:
        method = Tidal(budget_tokens=given.budget)
    except (ValueError, KnobError) as error:
        parser.error(f"--budget {given.budget}: {error}")
    prompts = calibration_prompts.prompts_of(parser, given)
    shortest = min(map(len, prompts))
    if shortest <= given.budget + POSITIONS:
        parser.error(
            f"--budget {given.budget}: the shortest prompt has {shortest} tokens, and a list must not hold all of "
            f"them: more than {given.budget + POSITIONS} are needed; give longer prompts or a smaller budget"
        )

    reuse = ReuseRecall(layers, config.num_attention_heads, method, POSITIONS)

    def measure(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> str:
        kept = reuse.observe(layer, query, key, scale).mean(1).tolist()
        before = f", {kept[-2]:.3f} with the layer before's" if layer else ""
        return f"{kept[-1]:.3f} of the attention kept with its own list{before}"

    observe(given.model, prompts, given.device, measure)
    recall = reuse.recall
    try:
        roles = choose_roles(recall, first, given.selections, given.recall_floor)
    except ValueError as error:
        parser.error(f"--recall-floor {given.recall_floor}: {error}; lower the floor or raise --budget")
    measured = Measured(
        given.model,
        method.budget_tokens,
        method.sink_tokens,
        method.recent_tokens,
        method.list_per,
        [len(prompt) for prompt in prompts],
        POSITIONS,
        recall_of(roles, recall),
    )
    Policy(roles, measured).save(given.output)
    default = method.layer_roles(layers)
    print(table(roles, default, recall, reuse.mass.mean(2).tolist()))
    print(
        f"{given.output}: worst recall {worst_recall(roles, recall):.3f}, "
        f"of the default policy {worst_recall(default, recall):.3f}"
    )


def table(roles: Sequence[Role], default: Sequence[Role], recall: list[list[float]], mass: list[list[float]]) -> str:
    """Markdown: each layer's role, recall and mean attention kept, of a policy and of the default one.

    Args:
        roles: of the policy.
        default: of the default policy.
        recall: ``[choosing][reading]``, of the worst head.
        mass: likewise, share of the attention that is kept, mean over heads.
    """
    lines = ["| layer | role | recall | kept | default | recall | kept |", "|---|---|---|---|---|---|---|"]
    columns = [(policy, recall_of(policy, recall), recall_of(policy, mass)) for policy in (roles, default)]
    for layer in range(len(roles)):
        cells = [str(layer)]
        for policy, recalls, kept in columns:
            cells += [
                policy[layer],
                *("" if found is None else f"{found:.3f}" for found in (recalls[layer], kept[layer])),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
