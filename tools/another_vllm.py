"""Test this checkout with another vLLM, in an environment of its own: `make test-vllm VERSION=0.33.0`.

vLLM's CUDA wheel is installed without its CUDA libraries and with the CPU torch of the set-up, and taken for the CPU
platform by vLLM's own variable. Its compiled kernels do not load there, so what runs is what asks vLLM's Python: the
hooks, the configuration, the doors of the server, plans, metadata and salts. No model is computed.

Usage: python -m tools.another_vllm VERSION [argument of pytest ...]
"""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tools import set_up

TESTS = (
    "tests/test_hooks.py",
    "tests/test_plugin.py",
    "tests/test_routing.py",
    "tests/test_registry.py",
    "tests/test_any_settings.py",
    "tests/test_params.py",
    "tests/test_presets.py",
    "tests/server",
    "tests/step",
    "tests/metrics",
    "tests/backend",
)
WITHOUT_KERNELS = "not interpreted and not gpu and not slow"

# Requirements of vLLM that only a GPU has a use for, or that do not load with a CPU torch, which is installed before.
FOR_GPUS = re.compile(
    r"(torch\w*|nvidia-.*|nvtx|flashinfer-.*|pynvvideocodec|tilelang|fastsafetensors|instanttensor|quack-kernels"
    r"|tokenspeed-mla|humming-kernels)",
    re.IGNORECASE,
)


def without_gpu_packages(requirements: list[str]) -> list[str]:
    """Those of a wheel's requirements that its Python code needs on a CPU.

    Args:
        requirements: as the wheel's metadata has them, markers included.
    """
    found = []
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        if "extra ==" not in requirement and not FOR_GPUS.fullmatch(name.group()):
            found.append(requirement)
    return found


@dataclass
class AnotherVllm(set_up.Environment):
    """An environment with vLLM's CUDA wheel on a machine without a GPU.

    Attributes:
        version: of vLLM.
    """

    version: str = ""

    def install_engine(self) -> None:
        """vLLM's wheel, and what its Python code imports."""
        self.install_cpu_torch()
        self.say(f"installing vllm {self.version} without its CUDA libraries, which pip is going to miss")
        self.must_install("--no-deps", f"vllm=={self.version}")
        required = self.output_of("import importlib.metadata; print(*importlib.metadata.requires('vllm'), sep='\\n')")
        self.must_install("setuptools>=77", *without_gpu_packages(required.splitlines()))
        self.check_engine()

    def check_engine(self) -> None:
        """vLLM loads, for the CPU."""
        platform = self.output_of("from vllm.platforms import current_platform; print(current_platform.device_type)")
        if platform.split() != ["cpu"]:
            raise set_up.SetUpError(f"vLLM {self.version} does not take itself for the CPU platform: {platform!r}")

    def output_of(self, code: str) -> str:
        """What code prints in the environment."""
        done = subprocess.run(
            [self.python, "-W", "ignore", "-c", code],
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise set_up.SetUpError(f"vLLM {self.version} does not load; what Python says is above.")
        return done.stdout

    def variables(self) -> dict[str, str]:
        """Of its processes."""
        programs = str(Path(self.python).parent)
        return {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "PATH": os.pathsep.join([programs, os.environ["PATH"]])}

    def test(self, arguments: list[str]) -> int:
        """Run the tests; pytest's exit status.

        Args:
            arguments: of pytest, after its own.
        """
        flags = [*set_up.test_flags(self.device).split(), "-p", "no:cacheprovider", "-m", WITHOUT_KERNELS]
        command = [self.python, "-m", "pytest", *flags, *TESTS, *arguments]
        return subprocess.run(command, cwd=self.root, env=self.variables(), check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Test this checkout with another vLLM.")
    parser.add_argument("version", help="a release of vLLM, such as 0.33.0")
    options, pytest_arguments = parser.parse_known_args(arguments)
    version: str = options.version
    root = Path(__file__).resolve().parents[1]
    folder = root / (os.environ.get("VENV") or ".venv") / f"vllm-{version}"
    environment = AnotherVllm(root, folder, "cpu", version=version)
    try:
        if not re.fullmatch(r"\d+\.\d+\.\d+(\.post\d+)?", version):
            raise set_up.SetUpError(f"VERSION: {version!r} is not a release of vLLM, such as 0.33.0")
        with set_up.only_one(root):
            environment.bring_up("test")
    except set_up.SetUpError as error:
        set_up.say(f"error: {error}")
        return 2
    return environment.test(pytest_arguments)


if __name__ == "__main__":
    sys.exit(main())
