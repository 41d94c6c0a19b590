"""``vllm-sparse calibrate sale MODEL``: find SALE's threshold of each layer and query head.

The model runs over a few prompts with dense attention. Each layer's thresholds are lowered, on its own queries, keys
and values, until the sparse output of every head is within the error bound on every prompt. The server loads the file:
--additional-config '{"sparse": {"sale": {"calibration": "FILE"}}}'.
"""

from __future__ import annotations

import argparse
import collections

import torch

from vllm_sparse.calibration import prompts as calibration_prompts
from vllm_sparse.calibration.model import config_and_layers, full_layers, observe, text_config
from vllm_sparse.methods.sale.calibration import FIRST_TAU, SaleCalibrator
from vllm_sparse.methods.sale.thresholds import Calibration


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="vllm-sparse calibrate sale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    calibration_prompts.add_arguments(parser)
    parser.add_argument(
        "--error-bound",
        type=float,
        default=0.05,
        help="largest relative error of a head's output over a prompt (default %(default)s)",
    )
    parser.add_argument(
        "--first-tau",
        type=float,
        default=FIRST_TAU,
        help="largest threshold tried, halved until the bound holds (default %(default)s, the paper's)",
    )
    given = parser.parse_args(arguments)
    config_and_layers(parser, given.model)
    prompts = calibration_prompts.prompts_of(parser, given)
    calibration = calibrate(given.model, prompts, given.error_bound, given.first_tau, given.device)
    calibration.save(given.output)
    taus = [tau for heads in calibration.thresholds for tau in heads]
    print(f"{given.output}: {_summary(taus)}; 0 leaves a head dense")


def calibrate(
    model_name: str, prompts: list[list[int]], error_bound: float, first_tau: float, device: str
) -> Calibration:
    """Run the model over prompts and find the thresholds, printing each layer's as they are found.

    Args:
        model_name: name or folder, as transformers loads it.
        prompts: token ids of each prompt.
        error_bound: as in `SaleCalibrator`.
        first_tau: likewise.
        device: where the model runs.
    """
    config = text_config(model_name)
    layers = len(full_layers(config))
    calibrator = SaleCalibrator(layers, config.num_attention_heads, error_bound, first_tau)

    def lower(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> str:
        errors = calibrator.observe(layer, query, key, value, scale)
        return f"{_summary(calibrator.thresholds[layer])}; largest error {max(errors):.3f}"

    observe(model_name, prompts, device, lower)
    return Calibration(
        model_name,
        layers,
        config.num_attention_heads,
        error_bound,
        [len(prompt) for prompt in prompts],
        calibrator.thresholds,
    )


def _summary(thresholds: list[float]) -> str:
    """How many heads have which threshold."""
    counts = sorted(collections.Counter(thresholds).items(), reverse=True)
    return "thresholds " + ", ".join(f"{tau:g} of {count} heads" for tau, count in counts)
