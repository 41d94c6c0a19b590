"""The library of CUDA kernels: built where nvcc is, with nothing else, and loaded without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from setup import ARCHITECTURES, build_libraries, find_nvcc
from vllm_sparse.kernels import cuda_library

FUNCTIONS = (
    *("vllm_sparse_quantise_keys", "vllm_sparse_low_bit_scores"),
    *("vllm_sparse_top_tokens", "vllm_sparse_top_coded_tokens"),
)

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc, or no g++ for it")


def test_without_a_host_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nvcc() is None


@needs_nvcc
def test_the_installed_package_has_the_library() -> None:
    for architecture in ARCHITECTURES:
        assert (cuda_library.FOLDER / f"{architecture}.so").exists(), "make setup builds it where nvcc is"


@needs_nvcc
def test_sources_compile_with_nvcc_alone_and_load_without_a_gpu(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None
    build_libraries(nvcc, tmp_path)
    library = ctypes.CDLL(str(tmp_path / "sm90.so"))
    for function in FUNCTIONS:
        assert getattr(library, function)
