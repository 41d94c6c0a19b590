"""Numbers of a report in the form that people read; what is not known is a dash."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sparse.quality.report.results import ALL_KINDS, Cell, Phase, Summary, density_of, is_sparse
from vllm_sparse.quality.statistics import Estimate
from vllm_sparse.quality.variants import Variant

DASH = "-"
TITLES = {
    "task": "tasks",
    "language": "language (mean -log p)",
    "decoding": "decoding (KL to dense)",
    "generation": "free generation",
    "recall": "recall by layer and head",
    "speed": "speed and density",
}
"""Of each measure's records."""


def number(value: float | None, form: str = "{:.3f}") -> str:
    """A value in a form."""
    return DASH if value is None else form.format(value)


def difference(found: Estimate, form: str = "{:+.3f}") -> str:
    """A mean with its interval, such as ``-0.012 [-0.031, +0.004]``."""
    if found.mean is None or found.interval is None:
        return number(found.mean, form)
    low, high = (form.format(end) for end in found.interval)
    return f"{form.format(found.mean)} [{low}, {high}]"


def parts(differences: Sequence[float]) -> str:
    """Differences of each part, in order."""
    return " ".join(f"{part:+.2f}" for part in differences) or DASH


def p_value(value: float | None) -> str:
    """With three digits."""
    return DASH if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def kind_of(cell: Cell) -> str:
    """The kind, marked where it cannot show a loss."""
    return ("all" if cell.kind == ALL_KINDS else cell.kind) + (" (dense too low)" if cell.dense_too_low else "")


def tokens(count: int) -> str:
    """A length: ``8K`` where it is whole, else the number."""
    return f"{count // 1024}K" if count and count % 1024 == 0 else str(count)


def densities(variant: Variant, prefill: float | None, decode: float | None) -> str:
    """Of the phases that are sparse: ``prefill 0.43, decode 0.35``."""
    known: tuple[tuple[Phase, float | None], ...] = (("prefill", prefill), ("decode", decode))
    said = [f"{phase} {number(value, '{:.2f}')}" for phase, value in known if is_sparse(variant, phase)]
    return ", ".join(said) or "1"


def variant_of(summary: Summary, name: str) -> Variant:
    """A variant by its name."""
    return next(one for one in summary.variants if one.name == name)


def density_at(summary: Summary, variant: str, length_tokens: int, phase: Phase) -> float | None:
    """Density of a variant at a length; None if not measured."""
    found = (one for one in summary.speed if (one.variant, one.length_tokens) == (variant, length_tokens))
    return density_of(next(found, None), phase)
