"""What attention and choosing cost on each GPU: measured numbers, from which `vllm_sparse.step.costs` predicts steps.

This file is data. The numbers were fitted to the tables of loadtest/RESULTS.md (tests/step/test_costs.py compares
them); `python -m loadtest.benchmarks.kernels.costs` measures a few cells on your GPU beside what is predicted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

TERA = 1e12


@dataclass(frozen=True)
class ChoosingCost:
    """What a decode method's choice costs in one layer beside the bytes that it scores.

    Attributes:
        launches_us: of its kernels, whatever the rows.
        row_us: of each row that chooses.
        scored_share: bytes read to choose from a context, of those of its keys and values;
            None: what the method says of itself (`DecodeMethod.summaries`, `scores_tokens`).
    """

    launches_us: float
    row_us: float = 0.0
    scored_share: float | None = None


@dataclass(frozen=True)
class SelectionCost:
    """What a prefill method's choice costs in one layer.

    Attributes:
        launches_us: of its kernels, however short the chunk.
        dense_share: of the dense attention's time for the same chunk.
        host_us: the host's time to launch what chooses and attends; the device has to be busy for longer, or waits.
    """

    launches_us: float
    dense_share: float
    host_us: float


CHOOSING: Mapping[str, ChoosingCost] = {
    "tidal": ChoosingCost(25.0),
    "blocktopk": ChoosingCost(35.0),
    "hip": ChoosingCost(16.0, row_us=1.5, scored_share=0.01),
    "tokentopk": ChoosingCost(31.0, row_us=0.4),
    "streaming": ChoosingCost(40.0),
}
OTHER_CHOOSING = ChoosingCost(60.0, row_us=2.0)
"""Of methods that were not measured, more than of any that was."""

SELECTION: Mapping[str, SelectionCost] = {
    # Of the first stage alone; the host's with both, of which the second was not timed.
    "dhsa": SelectionCost(120.0, 0.012, 1200.0),
    "hip": SelectionCost(250.0, 0.04, 1100.0),
    "flexprefill": SelectionCost(190.0, 0.04, 2100.0),
    "sale": SelectionCost(300.0, 0.28, 1200.0),
    "streaming": SelectionCost(100.0, 0.01, 600.0),
    # It computes all of the attention that it is to save.
    "oracle": SelectionCost(300.0, 1.5, 1500.0),
}
OTHER_SELECTION = SelectionCost(300.0, 0.3, 2100.0)


@dataclass(frozen=True)
class GpuCosts:
    """Constants of a GPU.

    Attributes:
        name: what the name that torch gives the device begins with.
        source: where the numbers are from.
        dense_bytes_per_second: at which dense decoding reads a context, at best.
        float8_share: of these, of an FP8 cache.
        list_bytes_per_second: at which lists of single tokens are read.
        scored_bytes_per_second: at which choosing reads keys or summaries, the choice from their scores included.
        dense_flops: of dense attention over a long prompt chunk, at best, with heads of 128 numbers.
        small_head_share: of these, with heads of at most 64, whose products wait for exponentials.
        reading_us: what the launch over lists takes longer in a layer than that over whole contexts, bytes aside.
        beside_us: what a layer that holds both launches takes longer than one with the launch over lists.
        outside_us: of a layer that decodes sparsely outside of FULL graphs, bound by the host.
        doubt: how many times what a sparse step pays counts against what it saves, when a step is decided.
        margin_us: what a step has to gain beside that.
        choosing: of decode methods, by name.
        selection: of prefill methods, by name.
    """

    name: str
    source: str
    dense_bytes_per_second: float
    list_bytes_per_second: float
    scored_bytes_per_second: float
    dense_flops: float
    small_head_share: float = 0.65
    float8_share: float = 1.0
    reading_us: float = 2.0
    beside_us: float = 10.0
    outside_us: float = 190.0
    # Near the break-even point little is to be gained, and small contexts in large batches were not measured.
    doubt: float = 1.5
    # One request of 32K tokens with `tidal` took 0.6 ms a step longer than dense in three runs, where all other cells
    # of the same graphs, longer and shorter ones, say that it takes 0.6 ms less. Not understood, so not relied upon.
    margin_us: float = 700.0
    choosing: Mapping[str, ChoosingCost] = field(default_factory=lambda: CHOOSING)
    selection: Mapping[str, SelectionCost] = field(default_factory=lambda: SELECTION)

    @property
    def as_predicted(self) -> GpuCosts:
        """The same without doubt, for comparisons with measurements."""
        return replace(self, doubt=1.0, margin_us=0.0)

    def dense_rate(self, number_bytes: int) -> float:
        """Bytes per second at which dense decoding reads a cache whose numbers have so many bytes, at best."""
        return self.dense_bytes_per_second * (self.float8_share if number_bytes == 1 else 1.0)

    def choosing_of(self, method: str) -> ChoosingCost:
        """Of a decode method."""
        return self.choosing.get(method, OTHER_CHOOSING)

    def selection_of(self, method: str) -> SelectionCost:
        """Of a prefill method."""
        return self.selection.get(method, OTHER_SELECTION)


def _with_memory_of(bandwidth: float, name: str, flops: float) -> GpuCosts:
    """A GPU of the H200's family that was not measured: its memory's speed, from its specification, sets the rates."""
    share = bandwidth / 4.8
    return replace(
        H200,
        name=name,
        source=f"the H200's numbers, scaled to {bandwidth} TB/s and {flops} TFLOP/s of the specification; not measured",
        dense_bytes_per_second=H200.dense_bytes_per_second * share,
        list_bytes_per_second=H200.list_bytes_per_second * share,
        scored_bytes_per_second=H200.scored_bytes_per_second * share,
        dense_flops=H200.dense_flops * flops / 989,
    )


H200 = GpuCosts(
    name="NVIDIA H200",
    source="loadtest/RESULTS.md: vLLM 0.32, Llama-3.1-8B geometry, CUDA graphs",
    dense_bytes_per_second=4.4 * TERA,
    list_bytes_per_second=3.9 * TERA,
    scored_bytes_per_second=2.05 * TERA,
    dense_flops=745 * TERA,
    # With one request of 128K; with six 0.4.
    float8_share=0.66,
)

UNKNOWN = GpuCosts(
    name="",
    source="no GPU of this name was measured: dense as on the fastest one known, choosing slower than on any",
    dense_bytes_per_second=4.4 * TERA,
    list_bytes_per_second=2.8 * TERA,
    scored_bytes_per_second=1.4 * TERA,
    dense_flops=745 * TERA,
    reading_us=4.0,
    beside_us=15.0,
    choosing={
        name: ChoosingCost(1.5 * of.launches_us, 1.5 * of.row_us, of.scored_share) for name, of in CHOOSING.items()
    },
    selection={
        name: SelectionCost(1.5 * of.launches_us, 1.5 * of.dense_share, of.host_us) for name, of in SELECTION.items()
    },
)

GPUS = (
    H200,
    _with_memory_of(3.35, "NVIDIA H100 80GB HBM3", 989),
    _with_memory_of(3.9, "NVIDIA H100 NVL", 835),
    _with_memory_of(2.0, "NVIDIA H100 PCIe", 756),
)


def costs_of(device_name: str) -> GpuCosts:
    """The constants of a GPU, `UNKNOWN` if nothing is known of it.

    Args:
        device_name: as ``torch.cuda.get_device_name`` says.
    """
    return next((gpu for gpu in GPUS if device_name.startswith(gpu.name)), UNKNOWN)
