"""The report as one HTML page that needs nothing else: style and charts are inside, and there are no scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vllm_sparse.quality.gate import Decision, Gate, Outcome
from vllm_sparse.quality.records import DENSE
from vllm_sparse.quality.report.charts import Series, chart, difference_map, recall_key, recall_map
from vllm_sparse.quality.report.escape import escaped
from vllm_sparse.quality.report.results import (
    ALL_KINDS,
    BASELINES,
    DEPTHS,
    PHASES,
    Cell,
    EqualDensity,
    Head,
    Measure,
    Phase,
    Speed,
    Summary,
    WorstPrompt,
    is_sparse,
)
from vllm_sparse.quality.report.style import STYLE
from vllm_sparse.quality.report.terminal import limits_in_words
from vllm_sparse.quality.report.words import (
    DASH,
    TITLES,
    densities,
    density_at,
    difference,
    number,
    tokens,
    variant_of,
)
from vllm_sparse.quality.statistics import LEAST_DOCUMENTS, Estimate
from vllm_sparse.quality.variants import Variant

# Of what models said; more does not help to see what went wrong.
MOST_CHARACTERS = 600
# The page runs nothing, whatever a model wrote.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TITLE = "Quality against dense"


def page(summary: Summary, gate: Gate) -> str:
    """The page of a run."""
    sections = [
        _head(summary),
        _verdict(summary, gate),
        _warnings(summary),
        _overview(summary, gate),
        _tasks(summary),
        _depths(summary),
        _against_density(summary),
        _against_speed(summary),
        _equal_density(summary),
        _language(summary),
        _decoding(summary),
        _generations(summary),
        _recall(summary),
        _speed(summary),
        _worst(summary),
        _not_measured(summary),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_TITLE}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], baselines: Iterable[bool] = ()) -> str:
    """A table of cells that are HTML already; the first of a row names it. `baselines`: rows that are one."""
    found = list(rows)
    soft = [*baselines, *(False for _ in found)]
    top = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        ("<tr class='baseline'>" if grey else "<tr>") + f"<th>{row[0]}</th>{''.join(map(_cell, row[1:]))}</tr>"
        for row, grey in zip(found, soft, strict=False)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def _words(content: str, kind: str = "text") -> str:
    return f'<td class="{kind}">{content}</td>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{''.join(parts)}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escaped(text)}</p>'


def _figures(charts: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(charts)}</div>'


def _estimate(found: Estimate, form: str = "{:+.3f}") -> str:
    """The mean, below it the interval."""
    mean, _, interval = difference(found, form).partition(" ")
    return f"{mean}<small>{interval}</small>" if interval else mean


def _methods(summary: Summary) -> list[Variant]:
    return [one for one in summary.variants if not one.baseline]


def _ordered(summary: Summary) -> list[Variant]:
    """Methods, then what they are judged by."""
    return sorted(summary.variants, key=lambda one: bool(one.baseline))


def _lengths(found: Iterable[int]) -> list[int]:
    return sorted(set(found))


def _head(summary: Summary) -> str:
    facts = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in summary.facts.items())
    return f"<h1>{_TITLE}</h1><dl>{facts}</dl>"


def _verdict(summary: Summary, gate: Gate) -> str:
    items = [f"<li>{_in_words(summary, gate, one)}</li>" for one in _methods(summary)]
    if not items:
        return _section("Verdict", "<p>No method was measured, only dense and baselines.</p>")
    note = (
        "A method passes when it meets every criterion that applies to it at every length that was measured; what was "
        "not measured, or on too few prompts, is not decided. A method that is not shown to be better than random "
        "pages of equal density is not to be offered."
    )
    return _section("Verdict", f"<ul>{''.join(items)}</ul>", _note(note), _note(limits_in_words(gate.limits)))


def _in_words(summary: Summary, gate: Gate, variant: Variant) -> str:
    name = f"<b>{escaped(variant.name)}</b>"
    outcome = gate.outcome_of(variant.name)
    if outcome == Outcome.PASSED:
        said = f'{name} <span class="good">passes the gate</span>.'
    else:
        failed = outcome == Outcome.FAILED
        verdict = '<span class="bad">fails</span>' if failed else '<span class="open">is not decided</span>'
        why = [
            f"<li>{_why(one)}</li>"
            for one in gate.decisions
            if one.variant == variant.name and one.outcome != Outcome.PASSED
            # What is missing besides does not make it fail.
            if not failed or one.outcome == Outcome.FAILED
        ]
        said = f"{name} {verdict}:<ul>{''.join(why)}</ul>" if why else f"{name} {verdict}: nothing was measured."
    weak = [
        f"{one.phase} at {tokens(one.length_tokens)}"
        for one in summary.equal_density
        if (one.variant, one.measure, one.baseline) == (variant.name, "tasks", "random")
        if not one.missing and not one.shown
    ]
    if weak:
        said += f'<p>Its tasks are <span class="bad">not shown to be better than random</span>: {", ".join(weak)}.</p>'
    return said


def _why(one: Decision) -> str:
    at = "" if one.length_tokens is None else f" at {tokens(one.length_tokens)}"
    return f"{one.criterion}{at}: {escaped(one.found)}"


def _warnings(summary: Summary) -> str:
    if not summary.notes:
        return ""
    items = "".join(f"<li>{escaped(note)}</li>" for note in summary.notes)
    return f'<div class="warnings"><p>Read with care</p><ul>{items}</ul></div>'


def _overview(summary: Summary, gate: Gate) -> str:
    whole = {(one.variant, one.length_tokens, one.measure): one for one in summary.cells if one.kind == ALL_KINDS}
    told = {(one.variant, one.length_tokens): one for one in summary.decoding}
    timed = {(one.variant, one.length_tokens): one for one in summary.speed}
    lengths = _lengths([*(length for _, length, _ in whole), *(length for _, length in (*told, *timed))])
    rows, baselines = [], []
    for length in lengths:
        for variant in _ordered(summary):
            place = variant.name, length
            tasks, language = whole.get((*place, "tasks")), whole.get((*place, "language"))
            decoding, speed = told.get(place), timed.get(place)
            if not (tasks or language or decoding or speed):
                continue
            rows.append(
                [
                    escaped(variant.name),
                    tokens(length),
                    _density(variant, speed),
                    _scored(tasks),
                    _estimate(language.difference, "{:+.4f}") if language else DASH,
                    _estimate(decoding.divergence, "{:.4f}") if decoding else DASH,
                    number(decoding.same_first, "{:.1%}") if decoding else DASH,
                    number(speed.ttft_ratio if speed else None, "{:.2f}x"),
                    number(speed.tpot_ratio if speed else None, "{:.2f}x"),
                    _words("" if variant.baseline else _outcomes(summary, gate, *place), "text line"),
                ]
            )
            baselines.append(bool(variant.baseline))
    if not rows:
        return ""
    header = ["", "length", "density", "score", "loss, nats", "KL, nats", "same first", "TTFT", "TPOT", "verdict"]
    note = (
        "Score, loss: variant minus dense, paired, all kinds of task weighing equally. Brackets are 95 % bootstrap "
        f"intervals over documents; fewer than {LEAST_DOCUMENTS} documents have none. * below 5 % after Holm's "
        "adjustment over the table. TTFT, TPOT: of dense's. Density: tokens read over tokens in reach, where sparse."
    )
    return _section("Methods side by side", _table(header, rows, baselines), _note(note))


def _density(variant: Variant, speed: Speed | None) -> str:
    known = (speed.prefill_density, speed.decode_density) if speed else (None, None)
    return escaped(densities(variant, *known)).replace(", ", "<br>")


def _scored(cell: Cell | None, form: str = "{:+.3f}") -> str:
    if cell is None:
        return DASH
    return ("* " if cell.significant else "") + _estimate(cell.difference, form)


def _outcomes(summary: Summary, gate: Gate, variant: str, length: int) -> str:
    """Of each criterion, and whether tasks beat random pages."""
    classes = {Outcome.PASSED: "good", Outcome.FAILED: "bad"}
    lines = [
        f'{one.criterion} <span class="{classes.get(one.outcome, "open")}">{one.outcome.value}</span>'
        for one in gate.decisions
        if (one.variant, one.length_tokens) == (variant, length)
    ]
    lines += [
        f'{one.phase} against random: <span class="{"good" if one.shown else "bad"}">'
        f"{'better' if one.shown else 'not shown to be better'}</span>"
        for one in summary.equal_density
        if (one.variant, one.length_tokens, one.measure, one.baseline) == (variant, length, "tasks", "random")
        if not one.missing
    ]
    return "<br>".join(lines)


def _tasks(summary: Summary) -> str:
    return _by_kind(
        summary,
        "tasks",
        "Tasks",
        "Score minus dense. * below 5 % after Holm's adjustment over all cells of methods (or of baselines) in these "
        "tables. † dense scores too low for a loss to show.",
        "{:+.3f}",
    )


def _by_kind(summary: Summary, measure: Measure, title: str, note: str, form: str) -> str:
    """A table for each length: variants over kinds, with dense's own mean on top."""
    cells = [one for one in summary.cells if one.measure == measure]
    parts = []
    for length in _lengths(one.length_tokens for one in cells):
        here = {(one.variant, one.kind): one for one in cells if one.length_tokens == length}
        kinds = [ALL_KINDS, *sorted({kind for _, kind in here if kind != ALL_KINDS})]
        shown = [one for one in _ordered(summary) if (one.name, ALL_KINDS) in here]
        dense = {kind: next(one for (_, name), one in here.items() if name == kind) for kind in kinds}
        rows = [["dense", "1", *(_dense_mean(dense[kind]) for kind in kinds)]]
        for variant in shown:
            speed = next((s for s in summary.speed if (s.variant, s.length_tokens) == (variant.name, length)), None)
            own = (here.get((variant.name, kind)) for kind in kinds)
            rows.append([escaped(variant.name), _density(variant, speed), *(_scored(one, form) for one in own)])
        names = [escaped(kind.replace("_", " ")) if kind else "all" for kind in kinds]
        table = _table(["", "density", *names], rows, [False, *(bool(one.baseline) for one in shown)])
        parts.append(f"<h3>{tokens(length)}</h3>{table}")
    return _section(title, *parts, _note(note)) if parts else ""


def _dense_mean(cell: Cell) -> str:
    mark = " †" if cell.dense_too_low else ""
    return f"{number(cell.dense_mean)}{mark}<small>{cell.difference.pairs} pairs</small>"


def _depths(summary: Summary) -> str:
    most = max((abs(one.difference) for one in summary.depths if one.difference is not None), default=0.0)
    columns = [f"{100 * part // DEPTHS}-{100 * (part + 1) // DEPTHS} %" for part in range(DEPTHS)]
    maps = []
    for variant in _methods(summary):
        own = [one for one in summary.depths if one.variant == variant.name]
        rows = [
            (tokens(length), [one.difference for one in own if one.length_tokens == length])
            for length in _lengths(one.length_tokens for one in own)
        ]
        if rows:
            maps.append(
                difference_map(variant.name, rows, columns, "where the answer stands in the text", max(most, 0.1))
            )
    note = "Score minus dense, of the questions whose answer stands in one place, by where it stands."
    return _section("By length and depth", _figures(maps), _note(note)) if maps else ""


def _against_density(summary: Summary) -> str:
    def density(variant: Variant, length: int, phase: Phase) -> float | None:
        return density_at(summary, variant.name, length, phase)

    charts = _quality_charts(summary, "density", density, "{phase} density")
    note = (
        "Score minus dense, all kinds together, with its 95 % interval. Up and to the left is better. Dashed: "
        "baselines at their densities, up to dense. A method that is sparse in both phases stands in both charts."
    )
    return _section("Quality against density", _figures(charts), _note(note)) if charts else ""


def _against_speed(summary: Summary) -> str:
    timed = {(one.variant, one.length_tokens): one for one in summary.speed}

    def ratio(variant: Variant, length: int, phase: Phase) -> float | None:
        found = None if variant.baseline else timed.get((variant.name, length))
        return None if found is None else found.ttft_ratio if phase == "prefill" else found.tpot_ratio

    charts = _quality_charts(summary, "speed", ratio, "{time}, of dense")
    note = (
        "Score minus dense over the time to the first token (prefill) and per token that follows (decode), of a "
        "request alone. Up and to the left is better; right of 1 is slower. Baselines are not built for speed."
    )
    return _section("Quality against speed", _figures(charts), _note(note)) if charts else ""


def _quality_charts(
    summary: Summary,
    what: str,
    x_of: Callable[[Variant, int, Phase], float | None],
    label: str,
) -> list[str]:
    """For each phase and length: score minus dense over what `x_of` says; without methods there is no chart."""
    whole = {
        (one.variant, one.length_tokens): one
        for one in summary.cells
        if one.measure == "tasks" and one.kind == ALL_KINDS and one.difference.mean is not None
    }
    charts = []
    for phase in PHASES:
        for length in _lengths(length for _, length in whole):
            series = []
            curves: dict[str, list[tuple[float, float]]] = {baseline: [] for baseline in BASELINES}
            for index, variant in enumerate(_ordered(summary)):
                cell, x = whole.get((variant.name, length)), x_of(variant, length, phase)
                if not is_sparse(variant, phase) or cell is None or cell.difference.mean is None or x is None:
                    continue
                if variant.baseline:
                    curves[variant.baseline].append((x, cell.difference.mean))
                else:
                    point, bar = (x, cell.difference.mean), cell.difference.interval
                    series.append(Series(variant.name, [point], index, [bar]))
            if not series:
                continue
            for index, (baseline, points) in enumerate(curves.items()):
                if points:
                    curve = [*sorted(points), (1.0, 0.0)]
                    series.append(Series(baseline, curve, index, marked=False, baseline=True))
            time = "TTFT" if phase == "prefill" else "TPOT"
            x_label = label.format(phase=phase, time=time)
            title = f"{phase.capitalize()} {what}, {tokens(length)}"
            charts.append(chart(title, series, x_label, "score minus dense"))
    return charts


def _equal_density(summary: Summary) -> str:
    """A row for each variant, length, measure and phase; a column for each baseline."""
    rows: dict[tuple[str, int, str, Phase], dict[str, EqualDensity]] = {}
    for one in summary.equal_density:
        rows.setdefault((one.variant, one.length_tokens, one.measure, one.phase), {})[one.baseline] = one
    if not rows:
        return ""
    cells = [
        [
            escaped(variant),
            tokens(length),
            measure,
            f"{phase} {number(found['random'].density, '{:.2f}')}",
            *(_better_by(found[baseline]) for baseline in BASELINES),
            _words(_against_random(found["random"])),
        ]
        for (variant, length, measure, phase), found in rows.items()
        if any(not one.missing for one in found.values())
    ]
    missing = dict.fromkeys(one.missing for one in summary.equal_density if one.missing)
    absent = _note(f"Not compared: {'; '.join(missing)}.") if missing else ""
    note = (
        "How much better than a baseline that reads as much in that phase: score, or nats of loss or of KL saved. The "
        "baseline is interpolated prompt by prompt between its two nearest settings, of which dense is the highest. "
        "The oracle knows the true attention: what is missing to it is what choosing better can bring."
    )
    header = ["", "length", "measure", "density", *(f"than {baseline}" for baseline in BASELINES), "verdict"]
    return _section("Against baselines of equal density", _table(header, cells) if cells else "", _note(note), absent)


def _better_by(one: EqualDensity) -> str:
    if one.missing:
        return DASH
    lowest = "<small>which reads more</small>" if one.below_lowest else ""
    return _estimate(one.advantage, "{:+.3f}" if one.measure == "tasks" else "{:+.4f}") + lowest


def _against_random(one: EqualDensity) -> str:
    kind = "open" if one.missing else "good" if one.shown else "bad"
    return f'<span class="{kind}">{escaped(one.verdict)}</span>'


def _language(summary: Summary) -> str:
    table = _by_kind(
        summary,
        "language",
        "Language",
        "Mean -log p of the last half of real texts minus dense, nats a token; every text weighs equally.",
        "{:+.4f}",
    )
    numbers = {one.name: index for index, one in enumerate(_ordered(summary))}
    charts = [
        chart(
            f"Loss by position, {tokens(length)}",
            [
                Series(variant.name, _along(one.difference), numbers[variant.name], marked=False)
                for variant in _methods(summary)
                for one in summary.positions
                if (one.variant, one.length_tokens) == (variant.name, length)
            ],
            "position in the text, share",
            "nats minus dense",
        )
        for length in _lengths(one.length_tokens for one in summary.positions if _is_method(summary, one.variant))
    ]
    return table.removesuffix("</section>") + _figures(charts) + "</section>" if table else ""


def _is_method(summary: Summary, name: str) -> bool:
    return not variant_of(summary, name).baseline


def _along(values: Sequence[float]) -> list[tuple[float, float]]:
    return [((part + 0.5) / len(values), value) for part, value in enumerate(values)]


def _decoding(summary: Summary) -> str:
    if not summary.decoding:
        return ""
    numbers = {one.name: index for index, one in enumerate(_ordered(summary))}
    found = summary.decoding
    rows = [
        [
            escaped(one.variant),
            tokens(one.length_tokens),
            str(one.texts),
            str(one.least_tokens),
            _estimate(one.divergence, "{:.4f}"),
            f"{one.same_first:.2%}",
        ]
        for one in found
    ]
    table = _table(
        ["", "length", "texts", "tokens, at least", "mean KL, nats", "same first token"],
        rows,
        [not _is_method(summary, one.variant) for one in found],
    )
    methods = [one for one in found if _is_method(summary, one.variant) and one.divergence_by_position]
    charts = [
        chart(
            f"KL by position, {tokens(length)}",
            [
                Series(one.variant, _along(one.divergence_by_position), numbers[one.variant], marked=False)
                for one in methods
                if one.length_tokens == length
            ],
            "generated tokens, share",
            "KL to dense, nats",
        )
        for length in _lengths(one.length_tokens for one in methods)
    ]
    note = "Every step is told what dense said before, so that each position is compared on equal terms."
    return _section("Decoding", table, _figures(charts), _note(note))


def _generations(summary: Summary) -> str:
    rows = [
        [
            escaped(one.variant),
            tokens(one.length_tokens),
            _words(escaped(one.kind)),
            str(one.difference.pairs),
            f"{one.median_tokens:.0f}",
            f"{one.median_prefix_tokens:.0f}",
            _estimate(one.difference),
            " ".join(f"{part:+.2f}" for part in one.difference_by_part) or DASH,
        ]
        for one in summary.generations
    ]
    header = ["", "length", "asked for", "pairs", "tokens", "same until", "score", "by quarter"]
    note = "Tokens generated, and tokens before the first that differs from dense: medians. Score minus dense."
    baselines = [not _is_method(summary, one.variant) for one in summary.generations]
    return _section("Free generation", _table(header, rows, baselines), _note(note)) if rows else ""


def _recall(summary: Summary) -> str:
    if not summary.recall:
        return ""
    rows = [
        [
            escaped(one.variant),
            tokens(one.length_tokens),
            one.phase,
            str(one.texts),
            number(sum(one.density) / len(one.density) if one.density else None, "{:.2f}"),
            number(one.mean),
            number(one.best_mean),
            _words(_heads(one.worst if _is_method(summary, one.variant) else one.worst[:3]), "text wide"),
        ]
        for one in summary.recall
    ]
    header = ["", "length", "phase", "texts", "density", "mass kept", "best list", "worst heads: layer.head"]
    baselines = [not _is_method(summary, one.variant) for one in summary.recall]
    maps = [
        recall_map(f"{one.variant}, {one.phase}, {tokens(one.length_tokens)}", one.recall)
        for one in summary.recall
        if _is_method(summary, one.variant)
    ]
    note = (
        "Attention mass kept of real texts, beside that of the best list of equal length, by layer and query head. Of "
        "baselines only the three worst heads are named."
    )
    key = recall_key() if maps else ""
    return _section("Recall", _table(header, rows, baselines), _note(note), key, _figures(maps))


def _heads(heads: Sequence[Head]) -> str:
    return ", ".join(f"{one.layer}.{one.head} {one.recall:.2f} of {one.best:.2f}" for one in heads)


def _speed(summary: Summary) -> str:
    rows = [
        [
            escaped(one.variant),
            tokens(one.length_tokens),
            str(one.repeats),
            number(one.ttft_s),
            number(one.ttft_ratio, "{:.2f}x"),
            number(one.tpot_s * 1e3, "{:.2f}"),
            number(one.tpot_ratio, "{:.2f}x"),
            "1" if one.variant == DENSE else _density(variant_of(summary, one.variant), one),
        ]
        for one in summary.speed
    ]
    header = ["", "length", "repeats", "TTFT s", "of dense", "TPOT ms", "of dense", "density"]
    baselines = [one.variant != DENSE and not _is_method(summary, one.variant) for one in summary.speed]
    note = "Medians of a request alone on the server; ratios are medians over pairs of equal prompts."
    return _section("Speed", _table(header, rows, baselines), _note(note)) if rows else ""


def _worst(summary: Summary) -> str:
    parts = []
    for variant in _methods(summary):
        own = [one for one in summary.worst if one.variant == variant.name]
        if own:
            parts.append(f"<h3>{escaped(variant.name)}</h3>{''.join(map(_prompt, own))}")
    note = (
        "The answers that lost most against dense, of each kind and length in turn. Texts of more than "
        f"{MOST_CHARACTERS} characters are cut."
    )
    return _section("Worst prompts", *parts, _note(note)) if parts else ""


def _prompt(one: WorstPrompt) -> str:
    place = [one.kind.replace("_", " "), tokens(one.length_tokens), f"document {one.document}", f"prompt {one.prompt}"]
    if one.depth is not None:
        place.append(f"depth {one.depth:.0%}")
    # Of a question the end counts, of an answer the beginning.
    asked = one.question if len(one.question) <= MOST_CHARACTERS else "… " + one.question[-MOST_CHARACTERS:]
    sides = [
        ("Question", asked),
        ("Expected", "\n".join(one.answers)),
        (f"Dense said, score {one.dense_score:.2f}", _cut(one.dense_text)),
        (f"{one.variant} said, score {one.score:.2f}", _cut(one.text)),
    ]
    boxes = "".join(f"<div><small>{escaped(name)}</small><pre>{escaped(text)}</pre></div>" for name, text in sides)
    return f'<div class="prompt"><p class="soft">{escaped(", ".join(place))}</p><div class="sides">{boxes}</div></div>'


def _cut(text: str) -> str:
    if not text:
        return "(nothing)"
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


def _not_measured(summary: Summary) -> str:
    if not summary.not_measured:
        return ""
    return _section("Not measured", f"<p>{escaped(', '.join(TITLES[name] for name in summary.not_measured))}.</p>")
