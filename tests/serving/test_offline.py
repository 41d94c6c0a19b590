"""vLLM without a server: the same settings through `SamplingParams(extra_args=...)`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.text.needles import score
from tests.serving.server import BOTH, prompt_of

PROMPTS = [prompt_of(seed, 3000) for seed in (60, 61)]
SPARSE = {**BOTH, "sparse_min_tokens": 512, "flexprefill_min_budget_tokens": 256, "tidal_budget_tokens": 256}


def run_offline(model_folder: Path, folder: Path, backend: str, extras: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Results of `offline_run.run` in a child process; an empty backend is vLLM's own choice."""
    task, result = folder / "task.json", folder / "result.json"
    chats = [prompt.messages for prompt in PROMPTS]
    task.write_text(
        json.dumps({"model_folder": str(model_folder), "backend": backend, "chats": chats, "extras": extras})
    )
    script = Path(__file__).with_name("offline_run.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(task), str(result)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    results: dict[str, Any] = json.loads(result.read_text())
    return results


@pytest.fixture(scope="module")
def sparse_backend(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dense and sparse texts with the sparse backend."""
    return run_offline(model_folder, tmp_path_factory.mktemp("offline"), "SPARSE", [None, SPARSE])


@pytest.mark.usefixtures("no_server")
class TestOffline:
    def test_sparse_settings(self, sparse_backend: dict[str, Any]) -> None:
        dense, sparse = sparse_backend["texts"]
        assert all(dense)
        assert all(sparse)
        assert sparse_backend["mixed"] == [dense[0], sparse[0]]

    def test_answers(self, sparse_backend: dict[str, Any], answers_known: None) -> None:
        for texts in sparse_backend["texts"]:
            assert [score(prompt, text) for prompt, text in zip(PROMPTS, texts, strict=True)] == [1, 1]

    def test_wrong_value(self, sparse_backend: dict[str, Any]) -> None:
        assert "sparse_decode is 'tidall'; allowed are dense, tidal" in sparse_backend["error"]

    def test_dense_is_what_vllm_generates_by_itself(
        self, sparse_backend: dict[str, Any], model_folder: Path, tmp_path: Path
    ) -> None:
        stock = run_offline(model_folder, tmp_path, "", [None])
        assert stock["texts"][0] == sparse_backend["texts"][0]
        assert "dense attention" in stock["error"]
