"""SALE's calibration: the search, the file, the command, and the server's setting that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.test_command import run_installed
from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.request import SparseParams, resolve
from vllm_sparse.config.salt import cache_salt
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.sale.calibration import SaleCalibrator, head_error, prompt_map
from vllm_sparse.methods.sale.thresholds import Calibration, load

MODEL = Path(__file__).parents[1] / "loadtest" / "model" / "weights"
LAYERS, HEADS = 2, 4


def calibration(thresholds: list[list[float]]) -> Calibration:
    return Calibration("m", len(thresholds), len(thresholds[0]), 0.05, [100], thresholds)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sale.json"
    calibration([[0.008, 0.004, 0.0, 0.001], [0.002, 0.002, 0.002, 0.002]]).save(path)
    return path


def heads(generator: torch.Generator, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one layer, with attention that some thresholds cut."""
    query, key, value = (torch.randn(count, tokens, 32, generator=generator) for count in (HEADS, 2, 2))
    return query * 4, key, value


def test_s11_every_prompt_is_within_the_bound(generator: torch.Generator) -> None:
    """Against an error computed in float64 from the map at the thresholds that came out."""
    calibrator = SaleCalibrator(1, HEADS, error_bound=0.02, first_tau=2.0)
    prompts = [heads(generator, tokens) for tokens in (700, 513)]
    before: list[float] = list(calibrator.thresholds[0])
    for query, key, value in prompts:
        calibrator.observe(0, query, key, value, 0.1)
        after = calibrator.thresholds[0]
        assert all(new <= old for new, old in zip(after, before, strict=True)), "thresholds may only fall"
        before = list(after)
    assert any(0 < tau < 2 for tau in before), "the bound must bind for this test to say anything"
    for query, key, value in prompts:
        kept = prompt_map(query, key, 0.1, before)
        tokens = query.shape[1]
        for head in range(HEADS):
            scores = (query[head].double() @ key[head // 2].double().T) * 0.1
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
            row = torch.arange(tokens)
            allowed = kept[head][row // 64].repeat_interleave(32, dim=1)[:, :tokens]
            allowed = allowed | (row >= (row // 64 * 64).unsqueeze(1))
            values = value[head // 2].double()
            dense = scores.softmax(1) @ values
            sparse = scores.masked_fill(~allowed, float("-inf")).softmax(1) @ values
            error = float((sparse - dense).norm() / dense.norm())
            assert error <= 0.02 + 1e-5
            assert head_error(query[head], key[head // 2], value[head // 2], 0.1, kept[head]) == pytest.approx(
                error, abs=1e-4
            )


def test_s11_the_same_prompts_give_the_same_thresholds(generator: torch.Generator) -> None:
    prompt = heads(generator, 600)
    first, again = (SaleCalibrator(1, HEADS, error_bound=0.02, first_tau=2.0) for _ in range(2))
    for calibrator in (first, again):
        calibrator.observe(0, *prompt, 0.1)
    assert first.thresholds == again.thresholds


def test_the_file_comes_back_as_it_was_written(file: Path) -> None:
    assert load(str(file)).contents.thresholds[0] == [0.008, 0.004, 0.0, 0.001]
    method = Sale(calibration=str(file))
    assert tuple(method.thresholds(Layer(0, 2), 2)) == (0.0, 0.001), "a rank takes its own heads"
    assert tuple(Sale(calibration=str(file), tau=0.5).thresholds(Layer(0, 0), 4)) == (0.5,) * 4


def test_only_the_server_names_the_file(file: Path) -> None:
    config = parse_server_config({"sparse": {"sale": {"calibration": str(file)}}}, LAYERS, HEADS)
    params = resolve({"sparse_prefill": "sale"}, config, LAYERS)
    assert isinstance(params.prefill, Sale)
    assert params.prefill.calibration == str(file)
    with pytest.raises(SparseParamsError, match="sale_calibration is a setting of the server") as refused:
        resolve({"sparse_prefill": "sale", "sale_calibration": "/etc/passwd"}, ServerConfig(), LAYERS)
    assert "sale_tau" in str(refused.value)
    assert "sale_calibration," not in str(refused.value)


def test_another_content_is_another_cache_identity(tmp_path: Path) -> None:
    salts = []
    for number, tau in enumerate((0.004, 0.002)):
        path = tmp_path / str(number) / "sale.json"
        path.parent.mkdir()
        calibration([[tau] * HEADS] * LAYERS).save(path)
        salts.append(load(str(path)).digest)
    assert salts[0] != salts[1]
    first, second = (SparseParams(Sale(calibration=str(tmp_path / str(n) / "sale.json"))) for n in range(2))
    assert cache_salt(first, None) != cache_salt(second, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "no SALE calibration"),
        ('{"model": "m"}', "no SALE calibration"),
        (json.dumps({"thresholds": [[-1.0]]}), "no SALE calibration"),
    ],
)
def test_a_wrong_file_is_refused_at_start(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "sale.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        parse_server_config({"sparse": {"sale": {"calibration": str(path)}}}, LAYERS, HEADS)
    assert "sale_calibration" in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_of_another_model_is_refused_at_start(file: Path) -> None:
    with pytest.raises(ValueError, match="2 layers of 4 query heads") as refused:
        parse_server_config({"sparse": {"sale": {"calibration": str(file)}}}, 32, 32)
    assert "32 layers of 32" in str(refused.value)


def test_a_server_has_one_threshold_or_a_file_of_them(file: Path) -> None:
    """A request may still set its own."""
    with pytest.raises(ValueError, match=r"sale_tau.*would never be used"):
        parse_server_config({"sparse": {"sale": {"calibration": str(file), "tau": 0.01}}}, LAYERS, HEADS)
    config = parse_server_config({"sparse": {"sale": {"calibration": str(file)}}}, LAYERS, HEADS)
    chosen = resolve({"sparse_prefill": "sale", "sale_tau": 0.01}, config, LAYERS).prefill
    assert isinstance(chosen, Sale)
    assert chosen.thresholds(Layer(0, 0), 1) == (0.01,)


def test_the_command_calibrates_the_bundled_model(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    ended = run_installed("calibrate", "sale", str(MODEL), "--output", str(output), "--tokens", "2000", "--count", "2")
    assert ended.returncode == 0, ended.stderr
    assert "prompt 2 of 2" in ended.stdout
    assert "layer 8 of 8" in ended.stdout
    found = load(str(output)).contents
    assert (found.layers, found.heads, len(found.prompts)) == (8, 4, 2)
    parse_server_config({"sparse": {"sale": {"calibration": str(output)}}}, 8, 4)


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    missing = run_installed(
        "calibrate", "sale", str(MODEL), "--output", str(tmp_path / "a.json"), "--prompts", "nowhere.jsonl"
    )
    assert missing.returncode == 2
    assert "nowhere.jsonl" in missing.stderr
    folder = run_installed("calibrate", "sale", str(MODEL), "--output", str(tmp_path / "none" / "a.json"))
    assert folder.returncode == 2
    assert "there is no folder" in folder.stderr
