"""`make test-vllm`: what is installed of another vLLM, and what is run with it. Nothing is installed here."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tools import another_vllm, set_up

ROOT = Path(__file__).resolve().parents[2]

# Of vLLM 0.33.0's wheel.
REQUIREMENTS = [
    "regex",
    'protobuf!=6.30.*,>=5.29.6; platform_machine != "s390x"',
    "fastapi[standard]<0.137.0,>=0.133.0",
    'six>=1.16.0; python_version > "3.11"',
    "torch==2.14.0",
    "torchvision==0.29.0",
    "apache-tvm-ffi==0.1.11",
    "nvidia-cutlass-dsl[cu13]==4.8.0",
    "flashinfer-python==0.7.2.post1",
    "PyNvVideoCodec==2.0.4",
    'tokenspeed-mla==2.0.3; platform_system == "Linux"',
    'pandas; extra == "bench"',
]


def test_what_only_gpus_need_is_left_out() -> None:
    assert another_vllm.without_gpu_packages(REQUIREMENTS) == [*REQUIREMENTS[:4], "apache-tvm-ffi==0.1.11"]


def test_vllm_comes_without_requirements_and_then_with_those_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[Sequence[str]] = []

    def record(command: Sequence[str], *, silent: bool = False) -> int:
        if not silent:
            installed.append(command[command.index("--no-input") + 1 :])
        return 0

    environment = another_vllm.AnotherVllm(ROOT, tmp_path, "cpu", run=record, say=lambda _: None, version="0.33.0")
    outputs = iter(["\n".join(REQUIREMENTS), "cpu\n"])
    monkeypatch.setattr(environment, "output_of", lambda _: next(outputs))
    environment.install_engine()
    torch, vllm, others = installed
    assert torch == [f"torch=={set_up.TORCH_VERSION}+cpu"]
    assert vllm == ["--no-deps", "vllm==0.33.0"]
    assert "regex" in others
    assert not any(other.startswith("torch") for other in others)


def test_another_platform_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = another_vllm.AnotherVllm(ROOT, tmp_path, "cpu", version="0.33.0")
    monkeypatch.setattr(environment, "output_of", lambda _: "\n")
    with pytest.raises(set_up.SetUpError, match=r"vLLM 0\.33\.0 does not take itself for the CPU platform"):
        environment.check_engine()


def test_tests_run_there_and_their_status_is_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[Sequence[str], dict[str, str]]] = []

    def run(command: Sequence[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append((command, env))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    environment = another_vllm.AnotherVllm(ROOT, tmp_path, "cpu", version="0.33.0")
    assert environment.test(["-k", "name"]) == 1
    ((command, variables),) = ran
    assert command[0] == str(tmp_path / "bin" / "python")
    assert command[-2:] == ["-k", "name"]
    assert set(another_vllm.TESTS) <= set(command)
    assert variables["VLLM_TARGET_DEVICE"] == "cpu"
    assert variables["PATH"].startswith(str(tmp_path / "bin"))


def test_its_tests_exist() -> None:
    assert [path for path in another_vllm.TESTS if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("version", ["latest", "0.33", "0.33.0+cpu"])
def test_what_is_no_version_is_refused(version: str, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Before anything is installed."""
    monkeypatch.setattr(another_vllm.AnotherVllm, "bring_up", lambda *_: pytest.fail("it installs"))
    assert another_vllm.main([version]) == 2
    assert f"VERSION: '{version}' is not a release of vLLM, such as 0.33.0" in capfd.readouterr().err
