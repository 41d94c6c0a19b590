"""vLLM ships one CPU library an instruction set; another than the processor's ends in "Illegal instruction"."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle import needs_cpu_kernel

ROOT = Path(__file__).parents[1]

# What the tests' own oracle loads, in a process of its own.
PROGRAM = """
import json, torch
from tests.oracle import packs
maps = open("/proc/self/maps").read().split()
print(json.dumps({
    "capabilities": [name for name, has in torch.cpu.get_capabilities().items() if has],
    "libraries": sorted({path.rpartition("/")[2].partition(".")[0] for path in maps if "/vllm/_C" in path}),
    "packs": {isa: packs(isa, torch.bfloat16) for isa in ("vec", "vec16", "amx")},
}))
"""


@needs_cpu_kernel
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one library")
@pytest.mark.parametrize("cpu", ["this", "avx2"])
def test_the_library_is_the_processors(cpu: str) -> None:
    """Chosen by its flags; ``avx2`` stands in for a processor without AVX-512 (`tests/avx2/sitecustomize.py`)."""
    hidden = str(ROOT / "tests" / "avx2")
    path = [str(ROOT), *([hidden] if cpu == "avx2" else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    newer = {name for name in found["capabilities"] if name.startswith("avx512")}
    if cpu == "avx2":
        assert newer == set()
    expected = "_C" if "avx512_bf16" in newer else "_C_AVX512" if "avx512_f" in newer else "_C_AVX2"
    assert found["libraries"] == [expected]
    assert found["packs"]["vec"]
    assert found["packs"]["vec16"]
    assert not found["packs"]["amx"] or expected == "_C", "keys packed for AMX need its library"
