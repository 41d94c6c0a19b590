"""A summary and its gate as Markdown tables, for a terminal and for documentation."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sparse.quality.gate import Gate, Limits
from vllm_sparse.quality.records import DENSE
from vllm_sparse.quality.report.results import ALL_KINDS, Cell, Measure, Summary
from vllm_sparse.quality.report.words import (
    DASH,
    TITLES,
    densities,
    difference,
    kind_of,
    number,
    p_value,
    parts,
    tokens,
    variant_of,
)

_DIGITS: dict[Measure, str] = {"tasks": "{:+.3f}", "language": "{:+.4f}", "decoding": "{:+.4f}"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up; a bar in a cell is escaped."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def tables(summary: Summary, *, by_kind: bool = True) -> str:
    """All that was measured, a table each.

    Args:
        by_kind: with the tables of each kind of task and of text alone, which are long.
    """
    whole = [one for one in summary.cells if one.kind == ALL_KINDS]
    each = [one for one in summary.cells if one.kind != ALL_KINDS] if by_kind else []
    parts = [
        ("Tasks: score minus dense, each kind weighs equally", _cells(summary, whole, "tasks")),
        ("Language: mean -log p of the last half minus dense, nats", _cells(summary, whole, "language")),
        ("Against baselines of equal density", _equal_density(summary)),
        ("Decoding, told the dense history", _decoding(summary)),
        ("Free generation", _generations(summary)),
        ("Recall", _recall(summary)),
        ("Speed, a request alone", _speed(summary)),
        ("Tasks by kind", _cells(summary, each, "tasks")),
        ("Language by kind", _cells(summary, each, "language")),
    ]
    said = [f"{title}\n\n{body}" for title, body in parts if body]
    if summary.not_measured:
        said.append(f"Not measured: {', '.join(TITLES[name] for name in summary.not_measured)}.")
    said += [f"! {note}" for note in summary.notes]
    return "\n\n".join(said)


def _cells(summary: Summary, cells: Sequence[Cell], measure: Measure) -> str:
    form = _DIGITS[measure]
    rows = [
        [
            tokens(one.length_tokens),
            one.variant,
            kind_of(one),
            densities(variant_of(summary, one.variant), one.prefill_density, one.decode_density),
            str(one.difference.pairs),
            str(one.difference.documents),
            number(one.dense_mean),
            number(one.variant_mean),
            difference(one.difference, form),
            p_value(one.difference.p),
            p_value(one.holm_p) + (" *" if one.significant else ""),
        ]
        for one in cells
        if one.measure == measure
    ]
    header = ["length", "variant", "kind", "density", "pairs", "documents", "dense", "variant's"]
    return table([*header, "difference [95 %]", "p", "Holm p"], rows) if rows else ""


def _equal_density(summary: Summary) -> str:
    rows = [
        [
            tokens(one.length_tokens),
            one.variant,
            one.measure,
            f"{one.phase} {number(one.density, '{:.2f}')}",
            one.baseline,
            _between(one.lower, one.upper, one.below_lowest),
            difference(one.advantage, _DIGITS[one.measure]),
            one.verdict,
        ]
        for one in summary.equal_density
        # Three baselines for each variant: those never run are one line below, not many here.
        if one.lower
    ]
    header = ["length", "variant", "measure", "density", "baseline", "made of", "better by [95 %]", "verdict"]
    said = [table(header, rows)] if rows else []
    missing = dict.fromkeys(one.missing for one in summary.equal_density if not one.lower)
    return "\n\n".join([*said, *(["Not compared: " + "; ".join(missing) + "."] if missing else [])])


def _between(lower: str, upper: str, below_lowest: bool) -> str:
    if below_lowest:
        return f"{lower}, which reads more"
    return lower if lower == upper else f"{lower} and {upper}"


def _decoding(summary: Summary) -> str:
    rows = [
        [
            tokens(one.length_tokens),
            one.variant,
            str(one.texts),
            str(one.least_tokens),
            difference(one.divergence, "{:.4f}"),
            f"{one.same_first:.2%}",
        ]
        for one in summary.decoding
    ]
    header = ["length", "variant", "texts", "tokens at least", "mean KL [95 %], nats", "same first token"]
    return table(header, rows) if rows else ""


def _generations(summary: Summary) -> str:
    rows = [
        [
            tokens(one.length_tokens),
            one.variant,
            one.kind,
            str(one.difference.pairs),
            f"{one.median_tokens:.0f}",
            f"{one.median_prefix_tokens:.0f}",
            f"{one.dense_score:.3f}",
            difference(one.difference),
            parts(one.difference_by_part),
            difference(one.agreement),
            parts(one.agreement_by_part),
            difference(one.loss),
            f"{number(one.dense_repeated, '{:.2f}')}, {number(one.repeated, '{:.2f}')}",
        ]
        for one in summary.generations
    ]
    header = ["length", "variant", "kind", "pairs", "tokens, median", "same until, median", "dense score"]
    header += ["score difference [95 %]", "by quarter", "agreement difference [95 %]", "by quarter"]
    header += ["-log p difference [95 %], nats", "repeated: dense, own"]
    return table(header, rows) if rows else ""


def _recall(summary: Summary) -> str:
    rows = [
        [
            tokens(one.length_tokens),
            one.variant,
            one.phase,
            str(one.texts),
            number(sum(one.density) / len(one.density) if one.density else None, "{:.2f}"),
            number(one.mean),
            number(one.best_mean),
            ", ".join(f"{head.layer}.{head.head} {head.recall:.2f} of {head.best:.2f}" for head in one.worst[:3]),
        ]
        for one in summary.recall
    ]
    header = ["length", "variant", "phase", "texts", "density", "mass kept", "best list's", "worst layer.head"]
    return table(header, rows) if rows else ""


def _speed(summary: Summary) -> str:
    rows = [
        [
            tokens(one.length_tokens),
            one.variant,
            str(one.repeats),
            number(one.ttft_s),
            number(one.ttft_ratio, "{:.2f}x"),
            number(one.tpot_s * 1e3, "{:.2f}"),
            number(one.tpot_ratio, "{:.2f}x"),
            "1"
            if one.variant == DENSE
            else densities(variant_of(summary, one.variant), one.prefill_density, one.decode_density),
        ]
        for one in summary.speed
    ]
    header = ["length", "variant", "repeats", "TTFT s", "of dense", "TPOT ms", "of dense", "density"]
    return table(header, rows) if rows else ""


def gate_table(gate: Gate) -> str:
    """Every decision, the whole outcome, and the numbers that decided."""
    rows = [
        [
            one.variant,
            DASH if one.length_tokens is None else tokens(one.length_tokens),
            one.criterion,
            one.outcome.value,
            one.found,
        ]
        for one in gate.decisions
    ]
    said = [table(["variant", "length", "criterion", "outcome", "found"], rows)] if rows else []
    return "\n\n".join([*said, limits_in_words(gate.limits), f"Gate: {gate.outcome.value}."])


def limits_in_words(limits: Limits) -> str:
    """The numbers that a gate is decided with."""
    shortest, longest = limits.decoding_lengths_tokens
    said = {
        "tasks": (
            f"tasks: difference at least {limits.least_mean_difference:+g}, its interval from at least "
            f"{limits.least_interval_end:+g}, on {limits.least_kinds} kinds of {limits.least_prompts_per_kind} prompts"
        ),
        "language": (
            f"language: at most {limits.most_loss_difference_nats:+g} nats on {limits.least_texts} texts, "
            "some of code and some of prose"
        ),
        "decoding": (
            f"decoding: mean KL at most {limits.most_divergence_nats:g} nats and the same first token in "
            f"{limits.least_same_first:.0%}, over {limits.least_decoding_tokens} tokens at {shortest} to {longest}"
        ),
    }
    smaller = "" if limits == Limits() else " These are not the numbers that a method's defaults have to meet."
    return f"Decided with {'; '.join(said[name] for name in limits.criteria)}.{smaller}"
