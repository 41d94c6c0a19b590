"""``vllm-sparse calibrate sale MODEL``: find SALE's threshold of each layer and query head.

The model runs over a few prompts with dense attention. Each layer's thresholds are lowered, on its own queries, keys
and values, until the sparse output of every head is within the error bound on every prompt. The server loads the file:
--additional-config '{"sparse": {"sale": {"calibration": "FILE"}}}'.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from vllm_sparse.calibrate.sale import FIRST_TAU, Calibration, SaleCalibrator

ATTENTION_NAME = "vllm_sparse_calibration"


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="vllm-sparse calibrate sale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name or folder, as transformers loads it")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a .jsonl file of strings or of objects with a prompt or text, else one text; best are prompts like "
        "those to be served; default: random keys and values, one of which is asked for",
    )
    parser.add_argument("--count", type=int, default=5, help="prompts, at most (default %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens of a prompt, the rest is cut off (default %(default)s)"
    )
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
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (default %(default)s)")
    given = parser.parse_args(arguments)
    if not given.output.parent.is_dir():
        parser.error(f"--output {given.output}: there is no folder {given.output.parent}")
    try:
        texts = read_prompts(given.prompts, given.count) if given.prompts else None
    except (OSError, ValueError) as error:
        parser.error(f"--prompts {given.prompts}: {error}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if texts is None:
        texts = [pairs_text(random.Random(given.seed + n), given.tokens, tokenizer) for n in range(given.count)]
    prompts = [tokenizer(text)["input_ids"][: given.tokens] for text in texts]
    calibration = calibrate(given.model, prompts, given.error_bound, given.first_tau, given.device)
    calibration.save(given.output)
    taus = [tau for heads in calibration.thresholds for tau in heads]
    print(f"{given.output}: {_summary(taus)}; 0 leaves a head dense")


def read_prompts(path: Path, count: int) -> list[str]:
    """The first prompts of a file.

    Raises:
        ValueError: a line is no prompt, or the file holds none.
    """
    text = path.read_text()
    if path.suffix != ".jsonl":
        prompts = [text] if text.strip() else []
    else:
        prompts = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            entry = json.loads(line)
            prompt = entry.get("prompt", entry.get("text")) if isinstance(entry, dict) else entry
            if not isinstance(prompt, str):
                raise ValueError(f"line {number} is neither a string nor an object with a prompt or text")
            prompts.append(prompt)
    if not prompts:
        raise ValueError("the file holds no prompt")
    return prompts[:count]


def pairs_text(rng: random.Random, tokens: int, tokenizer: Any) -> str:
    """A JSON object of random keys and values and a question about one, of about `tokens` tokens.

    The kind of text that the paper calibrates with (InfiniteBench's key-value retrieval).
    """

    def pairs(count: int) -> list[str]:
        return [f'"{rng.getrandbits(64):016x}": "{rng.getrandbits(64):016x}"' for _ in range(count)]

    sample = pairs(32)
    a_pair = len(tokenizer(", ".join(sample))["input_ids"]) / len(sample)
    lines = pairs(max(int((tokens - 100) / a_pair), 1))
    key = rng.choice(lines).split(":")[0]
    return f"Extract the value of a key from this JSON object.\n\n{{{', '.join(lines)}}}\n\nKey: {key}\nThe value is"


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
    from transformers import AttentionInterface, AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model_name).get_text_config()
    calibrator = SaleCalibrator(config.num_hidden_layers, config.num_attention_heads, error_bound, first_tau)
    attention = _CalibratingAttention(calibrator, len(prompts))
    # Before the model is loaded, which looks the name up.
    AttentionInterface.register(ATTENTION_NAME, attention)
    model = AutoModel.from_pretrained(model_name, dtype="auto", attn_implementation=ATTENTION_NAME).to(device).eval()
    with torch.inference_mode():
        for prompt in prompts:
            attention.prompt += 1
            model(input_ids=torch.tensor([prompt], device=device), use_cache=False)
    return Calibration(
        model_name,
        config.num_hidden_layers,
        config.num_attention_heads,
        error_bound,
        [len(prompt) for prompt in prompts],
        calibrator.thresholds,
    )


class _CalibratingAttention:
    """Attention for transformers: calibrates the layer, says so, and goes on with the dense output."""

    def __init__(self, calibrator: SaleCalibrator, prompts: int) -> None:
        self.calibrator = calibrator
        self.prompts = prompts
        self.prompt = 0

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        begin = time.monotonic()
        errors = self.calibrator.observe(module.layer_idx, query[0], key[0], value[0], scaling)
        thresholds = self.calibrator.thresholds
        print(
            f"prompt {self.prompt} of {self.prompts}, {query.shape[2]} tokens, "
            f"layer {module.layer_idx + 1} of {len(thresholds)}: {_summary(thresholds[module.layer_idx])}; "
            f"largest error {max(errors):.3f} ({time.monotonic() - begin:.1f} s)",
            flush=True,
        )
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2).contiguous(), None


def _summary(thresholds: list[float]) -> str:
    """How many heads have which threshold."""
    counts = sorted(collections.Counter(thresholds).items(), reverse=True)
    return "thresholds " + ", ".join(f"{tau:g} of {count} heads" for tau, count in counts)
