"""Starts that must fail, with a reason that a user understands."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving.server import free_port, serve_command

pytestmark = pytest.mark.usefixtures("no_server")

SMALL = ("--kv-cache-memory-bytes", "1G", "--max-model-len", "4096", "--enforce-eager")


@pytest.fixture
def failed_start(model_folder: Path) -> Callable[..., list[str]]:
    """Starts a server that must not come up; its last log lines that hold an error."""

    def start(*arguments: str, folder: Path = model_folder) -> list[str]:
        ended = subprocess.run(
            serve_command(folder, free_port(), [*SMALL, *arguments]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=180,
            check=False,
        )
        assert ended.returncode != 0, ended.stdout
        return [line for line in ended.stdout.splitlines() if "Error: " in line]

    return start


def test_unknown_setting(failed_start: Callable[..., list[str]]) -> None:
    errors = failed_start("--additional-config", '{"sparse": {"prefil": "flexprefill"}}')
    assert any(
        "--additional-config: sparse.prefil" in line and "there are preset, prefill" in line for line in errors
    ), errors


def test_unsupported_kv_cache(failed_start: Callable[..., list[str]]) -> None:
    errors = failed_start("--kv-cache-dtype", "fp8")
    assert any("attention backend sparse does not support" in line and "kv_cache_dtype" in line for line in errors), (
        errors
    )


def test_sliding_window_model(failed_start: Callable[..., list[str]], model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to((model_folder / name).resolve())
    errors = failed_start("--load-format", "dummy", folder=tmp_path)
    assert any("attention backend sparse" in line and "has a window" in line for line in errors), errors
