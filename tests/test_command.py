"""The command ``vllm-sparse``, and the benchmarks that run as modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sparse import command

ROOT = Path(__file__).parents[1]
PREFILL = (sys.executable, "-m", "loadtest.benchmarks.kernels.prefill")
DECODE = (sys.executable, "-m", "loadtest.benchmarks.kernels.decode")


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    # As a user's shell has it: with the repository on the path, it would be found from anywhere.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run_installed(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The installed command ``vllm-sparse``, likewise."""
    script = shutil.which("vllm-sparse", path=str(Path(sys.executable).parent))
    assert script is not None, "the package is installed without its command"
    return run(script, *arguments, folder=folder)


@pytest.mark.parametrize("arguments", [[], ["bench"], ["bench", "prefil"], ["--version"]])
def test_an_unknown_verb_is_named_with_those_that_exist(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{' '.join(arguments)!r} is no verb" in error
    assert "verbs: calibrate sale" in error


def test_help_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    assert "calibrate sale" in capsys.readouterr().out


def test_a_benchmark_prints_a_table() -> None:
    sizes = ["--lengths", "2048", "--chunk", "512", "--query-heads", "2", "--kv-heads", "1", "--head-size", "64"]
    ended = run(*PREFILL, *sizes, "--densities", "0.3", "--concentrations", "6", "--repeats", "1")
    assert ended.returncode == 0, ended.stderr
    methods = [line.split("|")[4].strip() for line in ended.stdout.splitlines() if line.startswith("| synthetic 6")]
    assert methods == ["flexprefill", "sale", "dhsa", "dhsa-two-stages-2x", "dhsa-two-stages-4x", "hip", "true mass"]


def test_the_decode_benchmark_prints_a_table() -> None:
    sizes = ["--lengths", "1024", "--query-heads", "2", "--kv-heads", "1", "--head-size", "64", "--batches", "1", "3"]
    ended = run(*DECODE, *sizes, "--budgets", "256", "--repeats", "2", "--methods", "tidal")
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("|") for line in ended.stdout.splitlines() if line.startswith("| synthetic 8")]
    assert [(row[3].strip(), row[5].strip(), row[6].strip()) for row in rows] == [
        ("1", "tidal", "256"),
        ("3", "tidal", "256"),
    ]


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["bench", "prefill", "--lengths", "2048"], "loadtest.benchmarks.kernels.prefill"),
        (["bench", "decode"], "loadtest.benchmarks.kernels.decode"),
        (["loadtest", "smoke"], "loadtest.load"),
    ],
)
def test_a_verb_that_is_not_installed_names_the_module_to_run_instead(
    arguments: list[str], module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert f"in the root of the vllm_sparse repository, run: python -m {module} ..." in capsys.readouterr().err


def test_the_installed_command_runs_a_verb_anywhere(tmp_path: Path) -> None:
    ended = run_installed("inspect", "--help", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "vllm-sparse inspect" in ended.stdout
