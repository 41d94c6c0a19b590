"""The servers that are to be broken: this plugin's with all methods, and stock vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from vllm_sparse.config.names import METHODS
from vllm_sparse.config.settings import MOST_PROMPT_COST, ServerConfig
from vllm_sparse.server_process import running

MODEL = Path(__file__).parents[1] / "model" / "weights"
MODEL_NAME = "needle"
LAYERS = 8
START_SECONDS = 600.0
ON_GPU = torch.cuda.is_available()
# Requests may ask for anything, also where a GPU would say that it does not pay, but for kernels of their own: there
# they would wait for the compiler.
SETTINGS = {
    "methods": METHODS,
    "min_tokens": 0,
    "unprofitable": "sparse",
    "prompt_cost": MOST_PROMPT_COST,
    "limits": {"new_kernels": "none" if ON_GPU else "any"},
}
CONFIG = ServerConfig.model_validate(SETTINGS)
SPARSE = ("--attention-backend", "sparse", "--additional-config", json.dumps({"sparse": SETTINGS}))
# The type rounds least of those that attention takes there: beside that a defect shows. The block is what the plugin
# takes by itself.
BLOCK_TOKENS = 128 if ON_GPU else 32
# Others may use the GPU too: vLLM asks at its start whether that share of it is free.
DEVICE = (
    ("--dtype", "float16", "--gpu-memory-utilization", "0.2") if ON_GPU else ("--dtype", "float32", "--enforce-eager")
)
COMMON = (*DEVICE, "--block-size", str(BLOCK_TOKENS), "--kv-cache-memory-bytes", "1G")


@dataclass(frozen=True)
class Served:
    """A running server: where it listens, and its first process."""

    url: str
    process: psutil.Process


@contextlib.contextmanager
def served(
    arguments: Sequence[str], log: Path, stock: bool = False, variables: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Serve the bundled model, with all processes ended afterwards.

    Args:
        arguments: of `vllm serve`, beside those that all servers here have.
        log: takes the server's output.
        stock: without the plugin, as if it were not installed.
        variables: of its environment, beside this process's.

    Raises:
        StartError: it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", MODEL_NAME, *COMMON, *(() if stock else SPARSE), *arguments]
    environment = {**os.environ, "VLLM_PLUGINS": "" if stock else "sparse", **(variables or {})}
    with running(command, url, log, START_SECONDS, environment) as process:
        yield Served(url, psutil.Process(process.pid))
