"""Starts the server that a model is measured on, where none runs yet."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.config.settings import MOST_PROMPT_COST, ServerConfig
from vllm_sparse.server_process import running

LOG_NAME = "server.log"
START_LIMIT_S = 1800


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        model: name or folder.
        methods: that requests will choose; each decode method takes CUDA graphs of its own, and so time at start-up.
        list_tokens: of the longest decode list that a baseline asks for, which CUDA graphs then hold.
        arguments: further ones of ``vllm serve``.
        by_script: tokens are told by `quality.script`, not by vLLM's trace replay, which needs model runner V2.
    """

    model: str
    methods: Sequence[str]
    list_tokens: int
    arguments: Sequence[str]
    by_script: bool

    def command(self, port: int) -> list[str]:
        """The command line."""
        # Nobody waits here for what variants with other shapes compile, or for what takes long.
        settings: dict[str, Any] = {
            "methods": list(self.methods),
            "limits": {"new_kernels": "any"},
            "prompt_cost": MOST_PROMPT_COST,
        }
        if self.list_tokens > ServerConfig().decode_list_tokens:
            settings["decode_list_tokens"] = self.list_tokens
        config = {"sparse": settings}
        told = (
            ["--logits-processors", "vllm_sparse.quality.script:ScriptProcessor", "--no-async-scheduling"]
            if self.by_script
            else ["--enable-trace-replay"]
        )
        return [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model),
            *("--attention-backend", "sparse", "--host", "127.0.0.1", "--port", str(port)),
            *("--additional-config", json.dumps(config), "--enable-scale-out", *told, *self.arguments),
        ]


@contextmanager
def serving(launch: Launch, folder: Path) -> Iterator[str]:
    """URL of a server that ends with the block; its log is written into the folder.

    Raises:
        StartError: it ended, or was not ready in time.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    # Its own routes are loaded only where the plugin is named.
    environment = {**os.environ, "VLLM_PLUGINS": "sparse"}
    with running(launch.command(port), url, folder / LOG_NAME, START_LIMIT_S, environment):
        yield url


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
