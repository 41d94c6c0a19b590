"""What the documentation shows is what the code takes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import find, render
from vllm_sparse.config.names import METHODS
from vllm_sparse.config.request import resolve
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.config.settings import ServerConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.*"))]
ALL_METHODS = ServerConfig(methods=METHODS)


def shown(pattern: str) -> list[tuple[str, Any]]:
    """JSON after a pattern, in all pages, with the page's name."""
    found = []
    for page in PAGES:
        if page.suffix in (".md", ".sh"):
            for match in re.finditer(pattern, page.read_text()):
                found.append((page.name, json.JSONDecoder().raw_decode(page.read_text()[match.end() :])[0]))
    return found


@pytest.mark.parametrize(("page", "extras"), shown(r"--extras '|--variant '\w+=|extra_args="))
def test_extras_are_taken(page: str, extras: dict[str, Any]) -> None:
    resolve(extras, ALL_METHODS, num_layers=24)


@pytest.mark.parametrize(("page", "config"), shown(r"(?<=')(?=\{\"sparse\")|(?<=    )(?=\{\"sparse\")"))
def test_server_settings_are_taken(page: str, config: dict[str, Any]) -> None:
    parse_server_config(config, num_layers=24, num_query_heads=32)


def test_the_chart_takes_the_values_for_kubernetes() -> None:
    values = yaml.safe_load((ROOT / "examples" / "kubernetes" / "values.yaml").read_text())
    assert find(render(values), "Deployment")
    for model in values["models"].values():
        parse_server_config({"sparse": model["sparse"]}, num_layers=36, num_query_heads=32)
