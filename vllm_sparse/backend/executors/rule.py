"""Which stock kernels serve which device: the one table.

Rows that read everything go through the kernel that vLLM itself would take. Lists of pages, which prompt chunks read,
and lists of single tokens, which decode rows read, may need another one: FlashAttention 2 reads pages of 16 tokens and
multiples, and which pages FlashAttention 4 reads is not known from vLLM's source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kernel = Literal["flash_attention", "triton"]
Choice = Literal["auto", "flash_attention", "triton"]


@dataclass(frozen=True)
class StockKernels:
    """Stock kernels that serve a device.

    Attributes:
        name: of the kernel that reads whole contexts, for messages.
        flash_attn_version: of that kernel; None: it is no FlashAttention.
        dense: what reads whole contexts.
        page_lists: what reads lists of pages of 16 tokens and multiples.
        token_lists: what reads lists of smaller pages and of single tokens.
        float8_from: compute capability from which the kernels read an FP8 cache; None: on no device.
    """

    name: str
    flash_attn_version: int | None
    dense: Kernel
    page_lists: Kernel
    token_lists: Kernel
    float8_from: tuple[int, int] | None

    def describe(self) -> str:
        """One line for the log."""
        kernels = {"flash_attention": self.name, "triton": TRITON.name}
        return (
            f"{kernels[self.dense]} reads whole contexts, {kernels[self.page_lists]} lists of pages, "
            f"{kernels[self.token_lists]} lists of tokens"
        )


TRITON = StockKernels("vLLM's Triton attention", None, "triton", "triton", "triton", (8, 9))

# By version, as vLLM resolves it for the device, the model and --attention-config.flash_attn_version.
FLASH_ATTENTION: Mapping[int, StockKernels] = {
    2: StockKernels("FlashAttention 2", 2, "flash_attention", "flash_attention", "triton", None),
    3: StockKernels("FlashAttention 3", 3, "flash_attention", "flash_attention", "flash_attention", (9, 0)),
    4: StockKernels("FlashAttention 4", 4, "flash_attention", "triton", "triton", (10, 0)),
}

# NVIDIA GPUs by compute capability. Those that are not named here run vLLM's Triton attention.
FLASH_ATTENTION_VERSIONS: Mapping[tuple[int, int], int] = {
    **dict.fromkeys(((8, 0), (8, 6), (8, 7), (8, 9)), 2),
    (9, 0): 3,
    **dict.fromkeys(((10, 0), (10, 3)), 4),
    (12, 0): 2,
}
LEAST_CAPABILITY = (8, 0)
# On which something of this package has run; the others are written from vLLM's source and compile.
TRIED = ((9, 0),)

SUPPORTED = (
    "supported are NVIDIA GPUs of compute capability 8.0 and newer (FlashAttention 2, 3 or 4, else vLLM's Triton "
    "attention), AMD GPUs that ROCm serves (vLLM's Triton attention) and x86-64 CPUs"
)


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        platform: ``cuda`` or ``rocm``, vLLM's name; of others nothing is served.
        capability: compute capability; of ROCm what PyTorch says, which decides nothing.
    """

    platform: str
    capability: tuple[int, int]

    @property
    def name(self) -> str:
        """For messages."""
        if self.platform == "cuda":
            return f"an NVIDIA GPU of compute capability {'.'.join(map(str, self.capability))}"
        return f"a device of vLLM's platform {self.platform}"

    @property
    def has_float8(self) -> bool:
        """Triton converts numbers of `torch.float8_e4m3fn` there."""
        return self.platform == "cuda" and self.capability >= (8, 9)

    @property
    def tried(self) -> bool:
        """Something of this package has run on such a device."""
        return self.platform == "cuda" and self.capability in TRIED


def stock_kernels(
    device: Device, choice: Choice = "auto", flash_attn_version: int | None = None, float8_cache: bool = False
) -> StockKernels:
    """The kernels that serve a device.

    Args:
        device: the device.
        choice: ``executor`` of the object sparse.
        flash_attn_version: of ``--attention-config``; None: the device's.
        float8_cache: the KV cache holds FP8 numbers.

    Raises:
        ValueError: nothing serves the device, or not as chosen; with what is supported.
    """
    if device.platform not in ("cuda", "rocm") or (device.platform == "cuda" and device.capability < LEAST_CAPABILITY):
        raise ValueError(f"attention backend sparse does not support {device.name}; {SUPPORTED}")
    own = FLASH_ATTENTION_VERSIONS.get(device.capability) if device.platform == "cuda" else None
    if choice == "flash_attention" and own is None:
        raise ValueError(
            'executor is "flash_attention" in --additional-config, object sparse, and no FlashAttention of vLLM '
            f'serves {device.name}; set "auto" or "triton"'
        )
    flash = None if own is None or choice == "triton" else FLASH_ATTENTION.get(flash_attn_version or own)
    kernels = flash or TRITON
    if not float8_cache or _reads_float8(kernels, device):
        return kernels
    if choice == "auto" and flash_attn_version is None and _reads_float8(TRITON, device):
        return TRITON
    raise ValueError(
        f"attention backend sparse does not read an FP8 KV cache with {kernels.name} on {device.name}; on NVIDIA GPUs "
        "FlashAttention 3 does on compute capability 9.0, FlashAttention 4 from 10.0 on and vLLM's Triton attention "
        "from 8.9 on; set --kv-cache-dtype auto, or leave out executor and --attention-config.flash_attn_version"
    )


def _reads_float8(kernels: StockKernels, device: Device) -> bool:
    return device.platform == "cuda" and kernels.float8_from is not None and device.capability >= kernels.float8_from
