"""An engine in this process for measurements: offline vLLM, with the plugin's worker metrics readable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import prometheus_client
from prometheus_client import multiprocess

from vllm_sparse.config.settings import MOST_PROMPT_COST
from vllm_sparse.metrics import DIRECTORY_VARIABLE, announce_directory


@contextmanager
def engine(model: str, backend: str, **arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM`, without prefix caching unless asked for, shut down at the end.

    Args:
        model: folder of the model.
        backend: attention backend, such as ``FLASH_ATTN`` or ``SPARSE``.
        arguments: further arguments of `vllm.LLM`.
    """
    announce_directory()
    from vllm import LLM

    settings = {"enable_prefix_caching": False, **arguments}
    if backend == "SPARSE":
        # What is measured runs as asked, whatever it costs.
        config = settings.get("additional_config", {})
        sparse = {"prompt_cost": MOST_PROMPT_COST, **config.get("sparse", {})}
        settings["additional_config"] = {**config, "sparse": sparse}
    llm = LLM(model, attention_backend=backend, disable_log_stats=False, seed=0, **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


class DensityReader:
    """Mean density of what ran since the last reading, by phase and method; before the first one, since it was made."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], float] = {}
        self()

    def __call__(self) -> dict[str, float]:
        """Mean density by ``phase/method``; empty if nothing sparse ran."""
        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=os.environ[DIRECTORY_VARIABLE])  # type: ignore[no-untyped-call]
        fresh: dict[str, dict[str, float]] = {}
        for family in registry.collect():
            for sample in family.samples:
                if sample.name in ("vllm_sparse_density_ratio_sum", "vllm_sparse_density_ratio_count"):
                    key = (sample.name, sample.labels["phase"], sample.labels["method"])
                    part = fresh.setdefault("/".join(key[1:]), {})
                    part[sample.name.rpartition("_")[2]] = sample.value - self._seen.get(key, 0.0)
                    self._seen[key] = sample.value
        return {key: part["sum"] / part["count"] for key, part in fresh.items() if part.get("count")}


def read_totals(*names: str) -> dict[str, float]:
    """Worker counters now, each summed over its labels; 0 where nothing was counted.

    Args:
        names: of samples, such as ``vllm_sparse_fallbacks_total``.
    """
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=os.environ[DIRECTORY_VARIABLE])  # type: ignore[no-untyped-call]
    samples = [sample for family in registry.collect() for sample in family.samples]
    return {name: sum(sample.value for sample in samples if sample.name == name) for name in names}
