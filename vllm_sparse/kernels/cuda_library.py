"""The CUDA kernels of csrc/: one library per architecture, built with the package if nvcc is found."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "libraries"
# Name of the library for each compute capability that has one.
ARCHITECTURES = {(9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}

# Of csrc/sm90/interface.cu: arguments as this package passes them.
INTERFACE = 3


class CudaError(RuntimeError):
    """A kernel of csrc/ was not launched, or its library is not this package's."""


@functools.cache
def cuda_library(device: torch.device) -> ctypes.CDLL | None:
    """The library for a device, or None if there is none.

    A missing library for an architecture that csrc/ supports is logged once.

    Raises:
        CudaError: the library was compiled from other sources than this package's.
    """
    # AMD's GPUs are "cuda" to PyTorch, and some have capability 9.0.
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    architecture = ARCHITECTURES.get(torch.cuda.get_device_capability(device))
    if architecture is None:
        return None
    path = FOLDER / f"{architecture}.so"
    if not path.exists():
        logger.warning(
            "vllm_sparse was installed without its CUDA kernels for %s (%s is missing, because there was no nvcc or no "
            "g++); SALE's selection and the choice of tokens in decoding run in Triton, which takes longer: "
            "decoding may then cost more than it saves. To have them, install again with both on PATH.",
            architecture,
            path,
        )
        return None
    return load(path)


def load(path: Path) -> ctypes.CDLL:
    """The library in a file.

    Args:
        path: of the file.

    Raises:
        CudaError: the library was compiled from other sources than this package's.
    """
    library = ctypes.CDLL(str(path))
    found = library.vllm_sparse_interface() if hasattr(library, "vllm_sparse_interface") else 1
    if found != INTERFACE:
        raise CudaError(
            f"{path} was compiled from other sources: its functions have interface {found}, this package calls "
            f"interface {INTERFACE}. Install the package again with nvcc and g++ on PATH, or remove the file: Triton "
            "then runs in its place, which takes longer."
        )
    return library


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether the library for a device is there and holds a function of this name."""
    library = cuda_library(device)
    return library is not None and hasattr(library, name)


def launch(name: str, device: torch.device, *arguments: object) -> None:
    """Launch a kernel on the device's current stream.

    Args:
        name: name of a function of the library, which must exist for the device.
        device: a CUDA device.
        arguments: the function's arguments but the last one, which is the stream.

    Raises:
        CudaError: CUDA refused the launch.
    """
    library = cuda_library(device)
    assert library is not None
    with torch.cuda.device(device):
        status = getattr(library, name)(*arguments, ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream))
    if status:
        raise CudaError(f"{name} was not launched: CUDA error {status} (see cudaError_t)")
