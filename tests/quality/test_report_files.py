"""What is written of a run: the page, the tables, JSON and CSV."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.quality.report_records import HOSTILE, KINDS, VARIANTS, fake_records, many_variants
from vllm_sparse.quality.gate import Limits, decide
from vllm_sparse.quality.records import DENSE, Record, TaskRecord
from vllm_sparse.quality.report.charts import Series, chart, recall_map, ticks
from vllm_sparse.quality.report.html import page
from vllm_sparse.quality.report.results import Summary
from vllm_sparse.quality.report.summary import summarise
from vllm_sparse.quality.report.terminal import gate_table, table, tables
from vllm_sparse.quality.report.write import write_report
from vllm_sparse.quality.variants import Variant

ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "h3", "p", "ul", "li", "b", "span"),
    *("dl", "dt", "dd", "div", "table", "thead", "tbody", "tr", "th", "td", "small", "br", "pre"),
    *("figure", "figcaption", "svg", "g", "line", "polyline", "text", "circle", "rect", "path"),
}
EMPTY = {"meta", "br"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; every element has to be closed where it belongs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.headings: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def page_of(summary: Summary, limits: Limits | None = None) -> Page:
    text = page(summary, decide(summary, limits))
    found = Page(text)
    assert found.elements <= ELEMENTS
    assert not [name for name in found.attributes if name.startswith("on") or name in ("src", "href", "style")]
    # Self-contained, and no script may run.
    assert "http" not in re.sub(r"http-equiv|http://served", "", text)
    assert "default-src 'none'" in text
    return found


def lost_answers(texts: tuple[str, ...], variant: str = "sale") -> list[Record]:
    """Dense was right, the variant said each text."""
    return [
        TaskRecord(name, 8192, kind, 0, 0, float(name == DENSE), text, (text,), 8000, 0.5, text)
        for kind, text in zip(KINDS, texts, strict=False)
        for name in (DENSE, variant)
    ]


@pytest.fixture
def whole(generator: torch.Generator) -> Summary:
    rng = np.random.default_rng(generator.initial_seed())
    facts = {"model": "fake", "server": "http://served", "command": HOSTILE[0]}
    return summarise(fake_records(rng, kinds=KINDS[:3], documents=6, prompts=2), VARIANTS, facts)


def test_every_section_of_a_whole_run(whole: Summary) -> None:
    found = page_of(whole)
    assert found.headings == [
        "Verdict",
        "Methods side by side",
        "Tasks",
        "By length and depth",
        "Quality against density",
        "Quality against speed",
        "Against baselines of equal density",
        "Language",
        "Decoding",
        "Free generation",
        "Recall",
        "Speed",
        "Worst prompts",
    ]
    text = " ".join(found.text)
    assert "too few prompts" in text
    assert "better than random" in text


def test_what_was_not_measured_has_no_section_and_is_named() -> None:
    records = [one for one in fake_records(np.random.default_rng(0), VARIANTS[:1], (8192,)) if one.measure == "task"]
    found = page_of(summarise(records, VARIANTS[:1], {}))
    assert "Language" not in found.headings
    assert "Recall" not in found.headings
    assert found.headings[-1] == "Not measured"
    assert "recall by layer and head" in " ".join(found.text)


def test_zero_records() -> None:
    found = page_of(summarise([], VARIANTS, {}))
    assert found.headings == ["Verdict", "Not measured"]
    assert "is not decided" in " ".join(found.text)


def test_only_baselines() -> None:
    rng = np.random.default_rng(0)
    found = page_of(summarise(fake_records(rng, VARIANTS[5:7], (8192,), KINDS[:1]), VARIANTS[5:7], {}))
    assert "No method was measured" in " ".join(found.text)


@pytest.mark.parametrize("hostile", [*HOSTILE, "\ud83d lone", "</style><script>x</script>", "<!--"])
def test_hostile_texts_are_shown_as_they_are(hostile: str, tmp_path: Path) -> None:
    name = hostile or "empty"
    records = lost_answers((hostile,) * 2, name)
    summary = write_report(tmp_path, records, [Variant(name, {"sparse_prefill": "x"})], {hostile: hostile})
    found = page_of(summary)
    shown = re.sub(r"[\x00\x1b\u202e\ud83d]", "", hostile).replace("\r", "")
    if hostile == shown and hostile:
        assert hostile in found.text
    assert not re.search(r"[\x00\x1b\u202e]", "".join(found.text))
    assert json.loads((tmp_path / "results.json").read_text())["worst"][0]["text"] == hostile
    with (tmp_path / "results.csv").open(newline="") as file:
        cells = [value for line in csv.DictReader(file) for value in line.values()]
    assert not [value for value in cells if re.match(r"[=+@]", value)]


def test_json_and_csv_hold_every_cell(whole: Summary, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = fake_records(rng, VARIANTS[:3], (8192,), KINDS[:2])
    summary = write_report(tmp_path / "new" / "folder", records, VARIANTS[:3], {"seed": "1"})
    found = json.loads((tmp_path / "new/folder/results.json").read_text())
    assert found["facts"] == {"seed": "1"}
    assert found["gate"]["exit_status"] in (1, 3)
    with (tmp_path / "new/folder/results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found["cells"]) == len(summary.cells)
    for line, cell in zip(lines, summary.cells, strict=True):
        assert (line["variant"], int(line["length_tokens"])) == (cell.variant, cell.length_tokens)
        assert cell.difference.mean is not None
        assert float(line["difference"]) == cell.difference.mean


def test_a_verdict_in_words(tmp_path: Path) -> None:
    records = fake_records(np.random.default_rng(0), VARIANTS[:4], hostile=False)
    summary = write_report(tmp_path, records, VARIANTS[:4], {})
    text = re.sub(r"<[^>]+>", "", (tmp_path / "report.html").read_text())
    assert "sale passes the gate" in text
    assert "blocktopk 4096 passes the gate" in text
    assert "tidal fails" in text
    assert "flexprefill fails" in text
    assert "tidal          | 32K    | decoding  | failed" in gate_table(decide(summary))


def test_the_page_says_with_which_numbers_it_was_decided() -> None:
    summary = summarise([], VARIANTS[:1], {})
    text = " ".join(page_of(summary, Limits(least_kinds=2, criteria=("tasks",))).text)
    assert "on 2 kinds of 40 prompts" in text
    assert "not the numbers that a method's defaults have to meet" in text


def test_twenty_variants_at_three_lengths(generator: torch.Generator) -> None:
    rng = np.random.default_rng(generator.initial_seed())
    variants = many_variants(20)
    summary = summarise(fake_records(rng, variants, (8192, 16384, 32768), documents=6, prompts=1), variants, {})
    assert len([one for one in summary.cells if one.measure == "tasks"]) == 20 * 3 * 13
    text = page(summary, decide(summary))
    assert len(text) < 3_000_000
    for variant in variants:
        assert variant.name in text


def test_tables_line_up(whole: Summary) -> None:
    said = [*tables(whole).split("\n"), *gate_table(decide(whole)).split("\n")]
    blocks: list[list[str]] = [[]]
    for line in said:
        if line.startswith("|"):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    found = [block for block in blocks if block]
    assert len(found) == 10
    for block in found:
        assert len({len(line) for line in block}) == 1
        assert len({line.count("|") - line.count("\\|") for line in block}) == 1
    assert tables(whole, by_kind=False).count("Tasks by kind") == 0


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert table(["a"], [["x | y\nz"]]).split("\n")[2] == "| x \\| y z |"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.03, 0, [-0.03, -0.02, -0.01, 0]), (0, 0, [0, 0.2])],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_series_past_the_last_colour_have_other_shapes() -> None:
    shapes = set()
    for number in range(32):
        svg = chart("t", [Series("t", [(0.5, 0.5)], number)], "x", "y")
        mark = re.search(r'<g class="(s\d)"><(\w+) (?:d="M[\d. ]+(l\S+))?', svg)
        assert mark
        shapes.add(mark.groups())
    assert len(shapes) == 32


def test_a_head_that_loses_nothing_is_blank() -> None:
    assert "fill-opacity" not in recall_map("t", [[1.0, 1.0], [1.0, 1.0]])
    lost = recall_map("t", [[1.0, 0.949], [0.3, 0.95]])
    assert re.findall(r'fill-opacity="([\d.]+)"', lost) == ["0.1", "0.2", "1"]
