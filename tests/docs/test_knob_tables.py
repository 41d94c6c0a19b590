"""The configuration page says what the code says."""

import pytest

from tools import knob_tables
from vllm_sparse.config.names import METHODS, PHASES, REQUEST_KEYS, knob_schema
from vllm_sparse.config.settings import ServerConfig


def test_the_tables_are_current() -> None:
    page = knob_tables.PAGE.read_text()
    assert knob_tables.with_tables(page) == page, "run: make docs"


def test_every_knob_has_a_line_with_a_meaning() -> None:
    lines = knob_tables.tables().splitlines()
    for phase, methods in PHASES.items():
        for method in methods:
            for knob in knob_schema(phase, method):
                (line, *_) = [line for line in lines if line.startswith(f"| `{method}_{knob}` |")]
                assert "|  |" not in line, f"{method}.{knob} has no description"


def test_a_page_without_a_place_for_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="0 places"):
        knob_tables.with_tables("nothing\n")


def test_the_page_names_all_settings() -> None:
    page = knob_tables.PAGE.read_text()
    settings = [name for name in ServerConfig.model_fields if name not in METHODS]
    assert [name for name in [*settings, *REQUEST_KEYS] if f"| `{name}` |" not in page] == []
