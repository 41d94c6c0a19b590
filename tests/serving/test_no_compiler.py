"""No request waits for a compiler: vLLM's own monitor sees none once a server is ready."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.server import Server
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS

pytestmark = pytest.mark.usefixtures("no_server")

PAGE_TOKENS = 128
SETTINGS = {
    "methods": sorted({*PREFILL_METHODS, *DECODE_METHODS} - {"oracle"}),
    "min_tokens": 1024,
    "unprofitable": "sparse",
    "tokentopk": {"page_tokens": PAGE_TOKENS},
}
EXTRAS: list[dict[str, Any]] = [
    {},
    *({"sparse_prefill": name} for name in PREFILL_METHODS if name != "oracle"),
    *({"sparse_decode": name} for name in DECODE_METHODS if name != "oracle"),
    {"sparse_prefill": "dhsa", "sparse_decode": "tokentopk"},
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_kernel_is_compiled_while_requests_are_served(model_folder: Path, tmp_path: Path) -> None:
    """Alone and together, of lengths and at rows of the block table that 16 divides and of others."""
    arguments = (
        *("--kv-cache-memory-bytes", "2G", "--gpu-memory-utilization", "0.1", "--max-num-seqs", "32"),
        *("--max-model-len", "8192", "--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"),
        *("--additional-config", json.dumps({"sparse": SETTINGS})),
    )
    server = Server(model_folder, arguments, tmp_path / "server.log")
    try:

        def ask(number: int, extras: Mapping[str, Any]) -> int:
            prompt = " ".join(f"{word} {number}" for word in range(600 + 70 * number))
            return server.complete(prompt, extras or None, max_tokens=40, ignore_eos=True).status

        alone = [ask(number, extras) for number, extras in enumerate(EXTRAS)]
        with ThreadPoolExecutor(2 * len(EXTRAS)) as threads:
            together = list(threads.map(ask, range(2 * len(EXTRAS)), EXTRAS * 2))
        assert {*alone, *together} == {200}
        log = server.log.read_text(errors="replace")
        assert "JIT monitor activated" in log
        assert not re.findall(r"JIT compilation during inference: (\w+)", log)
    finally:
        server.stop()
