"""Models whose layers are of several kinds: what is computed in this process, and which layers are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.hybrid_models import CONFIGS, WINDOW_TOKENS, full_layers, write_model
from tests.serving.multimodal_models import LAYERS, write_mrope_model
from tests.serving.server import random_prompt
from tests.test_command import run_installed
from vllm_sparse.calibration import model as calibration_model
from vllm_sparse.calibration.decoding import Decoder, Everything
from vllm_sparse.calibration.model import dense_attention, observe, text_config
from vllm_sparse.config.server import parse_server_config

PROMPT_TOKENS = 5 * WINDOW_TOKENS + 7


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("gemma3", tmp_path_factory.mktemp("models") / "gemma3")


def eager(folder: Path, tokens: list[int]) -> torch.Tensor:
    """What transformers computes with its own attention: logits after each token."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()
    with torch.inference_mode():
        logits: torch.Tensor = loaded(input_ids=torch.tensor([tokens])).logits[0]
    return logits.float()


@pytest.mark.parametrize("window", [None, 1, 5, 64, 700])
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_attention_equals_float64(
    window: int | None, tokens: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_model, "WINDOW_STEP", 100)
    query, key, value = (torch.randn(1, heads, tokens, 16, generator=generator) for heads in (6, 2, 2))
    found = dense_attention(query, key, value, 0.3, window)
    position = torch.arange(tokens)
    distance = position.unsqueeze(1) - position
    readable = (distance >= 0) & (distance < (window or tokens))
    wide = (each.double().repeat_interleave(3, 1) for each in (key, value))
    wide_key, wide_value = wide
    scores = (query.double() @ wide_key.transpose(2, 3) * 0.3).masked_fill(~readable, -torch.inf)
    expected = (scores.softmax(3) @ wide_value).transpose(1, 2)
    assert float((found.double() - expected).abs().max()) < 1e-5


def test_full_layers_are_shown_by_their_number(gemma: Path) -> None:
    seen: list[tuple[int, int]] = []

    def note(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> str:
        seen.append((layer, key.shape[1]))
        return ""

    observe(str(gemma), [random_prompt(1, PROMPT_TOKENS)], "cpu", note)
    assert seen == [(number, PROMPT_TOKENS) for number in range(len(full_layers("gemma3")))]


@pytest.mark.parametrize("window_tokens", [WINDOW_TOKENS, WINDOW_TOKENS - 8])
def test_a_model_with_windows_says_what_transformers_says(
    window_tokens: int, gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and told steps, beyond the window, which lists do not touch; another window says something else."""
    attention: Any = Decoder._attention

    def windowed(self: Decoder, *inputs: Any, sliding_window: int | None = None, **others: Any) -> Any:
        return attention(self, *inputs, sliding_window=sliding_window and window_tokens, **others)

    monkeypatch.setattr(Decoder, "_attention", windowed)
    decoder = Decoder(str(gemma), "cpu")
    prefix = decoder.prefill(random_prompt(2, PROMPT_TOKENS), 12)
    told = decoder.tell(prefix, Everything())
    assert told.divergence < 1e-6
    expected = eager(gemma, [*random_prompt(2, PROMPT_TOKENS), *prefix.said[:-1]])[PROMPT_TOKENS:]
    ours, theirs = (logits.float().log_softmax(1) for logits in (prefix.logits, expected))
    # In bfloat16.
    difference = float((ours - theirs).abs().mean())
    assert (difference < 0.15) is (window_tokens == WINDOW_TOKENS), difference


class Numbers:
    """Notes which layers are asked for lists."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def listed(self, layer: int, *_: Any) -> torch.Tensor | None:
        """As of `Lists`."""
        self.layers.append(layer)
        return None


def test_lists_are_for_full_layers(gemma: Path) -> None:
    decoder, numbers = Decoder(str(gemma), "cpu"), Numbers()
    decoder.tell(decoder.prefill(random_prompt(3, PROMPT_TOKENS), 4), numbers)
    assert numbers.layers == list(range(len(full_layers("gemma3"))))


def test_a_model_that_reads_images_says_what_transformers_says(tmp_path: Path) -> None:
    """Of a text: prompt and told steps, with positions of three axes."""
    from transformers import PaddleOCRVLForConditionalGeneration

    folder = write_mrope_model(tmp_path / "model")
    prompt = random_prompt(4, 300)
    decoder = Decoder(str(folder), "cpu")
    decoder.model.float()
    prefix = decoder.prefill(prompt, 8)
    numbers = Numbers()
    assert decoder.tell(prefix, numbers).divergence < 1e-6
    assert numbers.layers == list(range(LAYERS))
    stock = PaddleOCRVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logits = stock(input_ids=torch.tensor([[*prompt, *prefix.said[:-1]]])).logits[0, len(prompt) :]
    ours, theirs = (found.float().log_softmax(1) for found in (prefix.logits, logits))
    # Logits are kept in float16.
    assert float((ours - theirs).abs().max()) < 0.05


@pytest.mark.slow
def test_a_calibration_is_for_as_many_layers_as_the_server_counts(gemma: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "tokentopk.json"
    prompts.write_text("".join(json.dumps(f"The value of {word} is 7. " * 90) + "\n" for word in ("one", "two")))
    ended = run_installed(
        "calibrate", "tokentopk", str(gemma), "--output", str(output), "--prompts", str(prompts), "--count", "2",
        "--tokens", "600", "--budgets", "128", "--dense-layers", "0", "--divergence", "99", "--same", "0",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    layers = len(full_layers("gemma3"))
    settings = json.loads(output.read_text())
    assert max(settings["sparse"]["tokentopk"]["reuse_layers"]) < layers
    settings["sparse"]["methods"] = ["tokentopk"]
    parse_server_config(settings, layers, 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma2", "soft cap"), ("gpt_oss", "sinks"), ("llama4", "attend in chunks")],
)
def test_what_is_not_computed_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    with pytest.raises(ValueError, match=reason):
        calibration_model.full_layers(text_config(str(tmp_path)))


@pytest.mark.parametrize("method", ["tidal", "tokentopk", "sale"])
def test_commands_say_what_they_do_not_compute(method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama4"]))
    ended = run_installed("calibrate", method, str(tmp_path), "--output", str(tmp_path / "out.json"))
    assert ended.returncode == 2
    assert f"{tmp_path}: some of its layers attend in chunks" in ended.stderr


def test_no_full_layer_is_refused(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * CONFIGS["gemma3"]["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["gemma3"], "layer_types": kinds}))
    with pytest.raises(ValueError, match="none of its layers has full attention"):
        calibration_model.full_layers(text_config(str(tmp_path)))
