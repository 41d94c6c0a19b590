"""Running Triton kernels where there is no GPU.

Triton decides when it is imported whether it interprets, so without a GPU a test module runs once more, in a process of
its own with the interpreter on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN = DEVICE == "cuda" or "TRITON_INTERPRET" in os.environ

needs_triton = pytest.mark.skipif(not CAN_RUN, reason="in a process of its own: test_under_the_interpreter")


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors say that they are on one, so that kernels run in place of the reference."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


def run_under_the_interpreter(module: str, passing: int) -> None:
    """Run a test module with Triton's interpreter.

    Args:
        module: its file.
        passing: how many of its tests run there and must pass.
    """
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", module],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert f"{passing} passed" in run.stdout, run.stdout[-4000:]
