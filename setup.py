"""Builds the CUDA kernels of csrc/ into the package, where nvcc is found; pyproject.toml says everything else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Library:
    """A library of kernels.

    Attributes:
        code: machine code, as nvcc has it.
        sources: files of csrc/sm90, by a pattern each.
    """

    code: str
    sources: tuple[str, ...]


# By name of the library. What needs Hopper's tensor cores is Hopper's alone; on others Triton runs in its place.
ARCHITECTURES = {
    "sm90": Library("arch=compute_90a,code=sm_90a", ("*.cu",)),
    "sm100": Library("arch=compute_100,code=sm_100", ("top_tokens.cu", "top_coded_tokens.cu", "interface.cu")),
}


def find_nvcc() -> str | None:
    """The compiler on PATH, in CUDA_HOME, or where CUDA's packages put it; None also without g++, which it calls."""
    if not shutil.which("g++"):
        return None
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        (str(found) for home in homes if home and (found := Path(home) / "bin" / "nvcc").exists()), None
    )


def nvcc_command(nvcc: str, architecture: str) -> list[str]:
    """The compiler with what every compilation for an architecture has in common."""
    return [nvcc, "-std=c++17", "-O3", f"-gencode={ARCHITECTURES[architecture].code}"]


def architectures_of(nvcc: str) -> list[str]:
    """Libraries that a compiler knows the machine code of: 12.8 is the first that has Blackwell's."""
    command = [nvcc, "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return [name for name in ARCHITECTURES if name == "sm90" or f"compute_{name.removeprefix('sm')}" in known]


def build_libraries(nvcc: str, folder: Path) -> None:
    """Compile each architecture's sources into ``folder/<architecture>.so``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in architectures_of(nvcc):
        patterns = ARCHITECTURES[name].sources
        sources = [str(source) for pattern in patterns for source in sorted((ROOT / "csrc" / "sm90").glob(pattern))]
        command = [*nvcc_command(nvcc, name), "-shared", "-Xcompiler=-fPIC", "--cudart=static"]
        print(f"compiling csrc/ for {name} with {nvcc}")
        if subprocess.run([*command, "-o", str(folder / f"{name}.so"), *sources], check=False).returncode:
            sys.exit(
                f"{nvcc} does not compile csrc/ for {name}; what it says is above. CUDA 12.3 or newer is needed. To "
                "install without the CUDA kernels, which Triton then replaces, take nvcc off PATH and unset CUDA_HOME."
            )


class BuildPackage(build_py):
    """Adds the libraries to the package, in place for an editable installation."""

    def run(self) -> None:
        super().run()
        nvcc = find_nvcc()
        if nvcc is None:
            print(
                "nvcc and g++ were not both found: installing without the CUDA kernels of csrc/; Triton replaces them"
            )
            return
        base = ROOT if self.editable_mode else Path(self.build_lib)
        build_libraries(nvcc, base / "vllm_sparse" / "kernels" / "libraries")


class Wheel(bdist_wheel):
    """The libraries suit every Python version, but one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class BinaryDistribution(Distribution):
    """Installed where packages with machine code belong."""

    has_libraries: ClassVar[bool] = find_nvcc() is not None

    def has_ext_modules(self) -> bool:
        return self.has_libraries


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel}, distclass=BinaryDistribution)
