"""Compiling Triton kernels for Hopper where there is no GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

SHARED_MEMORY_BYTES = 227 * 1024


def compile_for_hopper(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Collection[str] = (),
) -> Any:
    """Compile a kernel for compute capability 9.0 and check that a multiprocessor can hold it.

    Args:
        kernel: a function under `triton.jit`, not interpreted.
        types: Triton type of each parameter that is no constant, such as ``*bf16`` or ``i32``.
        constants: values of the compile-time constants.
        num_warps: as in the launch.
        num_stages: as in the launch.
        aligned: parameters that are multiples of 16 in a launch, as most addresses and strides are; loads are of single
            numbers where Triton does not know it.

    Returns:
        Triton's compiled kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    missing = set(kernel.arg_names) - set(types) - set(constants)
    assert not missing, f"no type or value for {sorted(missing)}"
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES, f"{compiled.metadata.shared} bytes of shared memory"
    return compiled


def spilled_bytes(compiled: Any, folder: Path) -> int:
    """Bytes of local memory that each thread of a compiled kernel has, because registers are too few."""
    import triton

    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = re.search(r" STACK:(\d+) ", usage)
    assert stack, usage
    return int(stack[1])
