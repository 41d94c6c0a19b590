"""Makes every Python process believe that the CPU has AVX2 and nothing newer: ``PYTHONPATH=tests/avx2 make test``.

Python imports this module by itself where its folder is on PYTHONPATH, in child processes too. vLLM then loads its AVX2
library, and torch, oneDNN, MKL and the inductor leave AVX-512 unused, so that a developer's machine with AVX-512 runs
what laptops and older servers run, at their relative speeds. Nothing here counts where PYTHONPATH does not name it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import MappingProxyType, ModuleType
from typing import Any

NEWER_THAN_AVX2 = ("avx512", "avx_vnni", "avx10", "amx")

# Read when these libraries are loaded, which is later than this.
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"


class _AfterTorchCpu(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads `torch.cpu` as usual and hides newer instruction sets from whoever asks it, as vLLM does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        real = module.get_capabilities

        def get_capabilities() -> MappingProxyType[str, Any]:
            return MappingProxyType(
                {name: has and not name.startswith(NEWER_THAN_AVX2) for name, has in real().items()}
            )

        module.get_capabilities = get_capabilities  # type: ignore[attr-defined]


sys.meta_path.insert(0, _AfterTorchCpu())
