"""The plot shows the benchmark's own lines."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from loadtest.benchmarks.kernels.plot import TableError, draw, recalls
from loadtest.benchmarks.kernels.prefill import HEADER, Measurement, line

ONE = Measurement("recorded", 32768, 8192, "dhsa", 0.2, 0.001, 0.002, 0.02, 0.7, 0.1)


def test_lines_are_read_as_the_benchmark_prints_them() -> None:
    lines = [ONE, replace(ONE, density=0.1, recall=0.5), replace(ONE, method="true <mass>", recall=0.9)]
    table = "\n".join(["some GPU", HEADER, *(line(one) for one in lines)])
    found = recalls(table)
    assert found == {"dhsa": [(0.1, 0.5), (0.2, 0.7)], "true <mass>": [(0.2, 0.9)]}
    root = ElementTree.fromstring(draw(found))
    names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"dhsa", "true <mass>"} <= set(names)
    first, second = root.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(float(part) for part in point.split(",")) for point in first.attrib["points"].split()]
    assert points[0][0] < points[1][0], "density grows to the right"
    assert points[0][1] > points[1][1], "recall grows upwards"
    assert len(second.attrib["points"].split()) == 1


@pytest.mark.parametrize("table", ["", "no table", HEADER])
def test_no_table_is_said(table: str) -> None:
    with pytest.raises(TableError):
        recalls(table)
