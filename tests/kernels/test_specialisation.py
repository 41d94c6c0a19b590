"""Triton compiles a kernel anew for each alignment of an address that it may tell apart, in the middle of serving."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import vllm_sparse.kernels
from tests.kernels.interpreter import CAN_RUN, DEVICE

pytest.importorskip("triton")


def kernels() -> Iterator[tuple[str, Any]]:
    """Kernels that are launched, by name."""
    for op in pkgutil.iter_modules(vllm_sparse.kernels.__path__):
        try:
            module = importlib.import_module(f"vllm_sparse.kernels.{op.name}.triton")
        except ModuleNotFoundError:
            continue
        yield from ((name, value) for name, value in vars(module).items() if name.endswith("_kernel"))


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_no_kernel_tells_a_requests_row_of_the_block_table_by_its_alignment() -> None:
    """Which row of vLLM's table a request has decides how its address is aligned."""
    found = dict(kernels())
    assert len(found) > 30
    having = {name: kernel for name, kernel in found.items() if "block_table_pointer" in kernel.arg_names}
    assert len(having) > 15
    telling = [
        name
        for name, kernel in having.items()
        if not kernel.params[kernel.arg_names.index("block_table_pointer")].do_not_specialize_on_alignment
    ]
    assert not telling
