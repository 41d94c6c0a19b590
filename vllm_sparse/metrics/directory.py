"""How metrics of worker processes reach the server's ``/metrics``.

vLLM serves the API server's registry, which workers cannot reach. The API server therefore makes a private directory
for prometheus_client's multi-process files before it starts the engine (`announce_directory`), workers write there
(`write_to_announced_directory`), and the API server merges it back (`vllm_sparse.server.collector`). Where vLLM itself
runs several API servers it has set such a directory up already, and that one is used.
"""

from __future__ import annotations

import os

import prometheus_client

from vllm_sparse.shared_directory import announce, announced_here

# Handed to child processes through the environment, not meant to be set by users.
DIRECTORY_VARIABLE = "SPARSE_METRICS_DIRECTORY"
PROMETHEUS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def announce_directory() -> None:
    """In the API server, before the engine starts: make the directory that its children write metrics to."""
    if PROMETHEUS_VARIABLE not in os.environ:
        announce(DIRECTORY_VARIABLE, "vllm-sparse-metrics-")


def write_to_announced_directory() -> None:
    """In a worker, before its first metric: switch this process to multi-process files."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    # The process that announced needs no files for its own metrics.
    if directory is None or announced_here(DIRECTORY_VARIABLE) or PROMETHEUS_VARIABLE in os.environ:
        return
    os.environ[PROMETHEUS_VARIABLE] = directory
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue()  # type: ignore[no-untyped-call]
