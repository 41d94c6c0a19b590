"""The library of CUDA kernels: built where nvcc is, with nothing else, and loaded without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from pathlib import Path

import pytest
import torch

from setup import ARCHITECTURES, architectures_of, build_libraries, find_nvcc, nvcc_command
from vllm_sparse.kernels import cuda_library

OF_ANY = ("vllm_sparse_interface", "vllm_sparse_top_tokens", "vllm_sparse_top_coded_tokens")
# Of the library of each architecture.
CSRC = Path(__file__).parents[2] / "csrc" / "sm90"
# SHA-256 of what csrc/ declares to Python, for each interface that it has had.
DECLARATIONS = {
    2: "16ebddea9f927626b39080f49d9f3f1ffd14d573b480a845aaeea4fff78049d5",
    3: "6bd7fcfc72eeccf1aae3740ea54e18fbbf94890992ea5fe13ab35be4bc1f9e4c",
}
FUNCTIONS = {"sm90": ("vllm_sparse_quantise_keys", "vllm_sparse_low_bit_scores", *OF_ANY), "sm100": OF_ANY}

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc, or no g++ for it")


def test_without_a_host_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nvcc() is None


@needs_nvcc
def test_the_installed_package_has_the_library() -> None:
    nvcc = find_nvcc()
    assert nvcc is not None
    for architecture in architectures_of(nvcc):
        assert (cuda_library.FOLDER / f"{architecture}.so").exists(), "make setup builds it where nvcc is"


@needs_nvcc
def test_sources_compile_with_nvcc_alone_and_load_without_a_gpu(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None
    build_libraries(nvcc, tmp_path)
    for architecture in architectures_of(nvcc):
        library = ctypes.CDLL(str(tmp_path / f"{architecture}.so"))
        assert [name for name in FUNCTIONS["sm90"] if hasattr(library, name)] == list(FUNCTIONS[architecture])


def test_the_interface_rises_with_the_functions_arguments() -> None:
    """Whoever changes arguments raises the number in interface.cu and `INTERFACE`, and adds the new digest here."""
    sources = "".join(path.read_text() for path in sorted(CSRC.glob("*.cu")))
    declarations = re.findall(r'extern "C" [^{]*', sources)
    assert len(declarations) == len(FUNCTIONS["sm90"]) + 1, "and the splits of the choice of tokens"
    assert re.search(r"vllm_sparse_interface\(\) { return (\d+); }", sources).group(1) == str(cuda_library.INTERFACE)  # type: ignore[union-attr]
    digest = hashlib.sha256(" ".join("".join(declarations).split()).encode()).hexdigest()
    assert DECLARATIONS[cuda_library.INTERFACE] == digest


@needs_nvcc
def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    source, library = tmp_path / "old.cu", tmp_path / "old.so"
    source.write_text('extern "C" int vllm_sparse_top_tokens() { return 0; }')
    nvcc = find_nvcc()
    assert nvcc is not None
    subprocess.run([*nvcc_command(nvcc, "sm90"), "-shared", "-Xcompiler=-fPIC", "-o", library, source], check=True)
    with pytest.raises(cuda_library.CudaError, match=r"interface 1, this package calls interface 3\. Install the"):
        cuda_library.load(library)


def test_every_library_is_some_devices() -> None:
    assert set(cuda_library.ARCHITECTURES.values()) == set(ARCHITECTURES) == set(FUNCTIONS)


def test_amds_gpus_have_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch calls them "cuda", and a capability of 9.0 has an AMD GPU too."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert cuda_library.cuda_library.__wrapped__(torch.device("cuda")) is None
