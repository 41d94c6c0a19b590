"""``vllm-sparse inspect`` as a user runs it, on the bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.inspect.test_page import PageReader
from tests.serving.server import prompt_of
from tests.test_command import run_installed
from vllm_sparse.inspect.command import main

MODEL = Path(__file__).parents[2] / "loadtest" / "model" / "weights"
BOTH = {"sparse_prefill": "sale", "sparse_decode": "blocktopk", "blocktopk_budget_tokens": 128, "sparse_min_tokens": 0}


def arguments_of(prompt: Path | str, extras: Any, output: Path, *more: str, model: Path | str = MODEL) -> list[str]:
    """The command line, verb left out."""
    given = extras if isinstance(extras, str) else json.dumps(extras)
    named = ["--prompt", str(prompt), "--extras", given, "--output", str(output), "--device", "cpu"]
    return [str(model), *named, *more]


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompt.txt"
    file.write_text(prompt_of(3, 1200).content)
    return file


def test_a_page_is_written_and_progress_is_shown(prompt: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    ended = run_installed("inspect", *arguments_of(prompt, BOTH, output, "--chunk", "512"))
    assert ended.returncode == 0, ended.stderr
    assert "layer 8 of 8: prefill density" in ended.stdout
    text = output.read_text()
    assert "What sale and blocktopk kept" in text
    assert "in 3 chunks of 512 tokens" in text
    figures = PageReader(text).figures
    assert {(phase, layer) for phase, layer, _ in figures} == {
        *(("prefill", layer) for layer in range(8)),
        *(("decode", layer) for layer in range(2, 8)),
    }
    assert all(0 < float(figure.data["data-recall"]) <= 1.0001 for figure in figures.values())
    assert min(float(figure.data["data-density"]) for figure in figures.values()) < 0.2


def test_settings_of_the_server_count(prompt: Path, tmp_path: Path) -> None:
    additional = {"sparse": {"prefill": "dhsa", "min_tokens": 800, "dhsa": {"density": 0.3}}}
    output = tmp_path / "page.html"
    main(arguments_of(prompt, {}, output, "--additional-config", json.dumps(additional), "--attention-up-to", "1000"))
    text = output.read_text()
    assert re.search(r"<dd>dhsa: .*density 0\.3,", text)
    assert "The settings leave decoding dense." in text
    assert "longer than 1000 tokens" in text
    assert "Recall</b> by layer" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"extras": {"sparse_prefill": "flexprefil"}},
            "sparse_prefill is 'flexprefil'; allowed are dense, flexprefill",
        ),
        ({"extras": {"sparse_prefill": "sale", "sale_tau": "x"}}, "--extras: sale_tau is 'x'"),
        ({"extras": {}}, "choose a method"),
        ({"extras": {"sparse_prefill": "sale", "sale_tau": 0}}, "nothing is sparse"),
        ({"extras": "{sparse"}, "--extras {sparse: no JSON"),
        ({"extras": "[]"}, "a JSON object is allowed"),
        ({"extras": {"sparse_prefill": "sale"}}, "tokens is no longer than sparse_min_tokens 8192: give a longer"),
        ({"extras": {"sparse_decode": "tidal"}}, "tokens is shorter than sparse_min_tokens 8192: give"),
        ({"more": ["--mark", "nowhere to be found"]}, "--mark 'nowhere to be found': a text that stands in the prompt"),
        (
            {"extras": {"sparse_decode": "tidal", "sparse_min_tokens": 0}},
            "no longer than the 2048 tokens",
        ),
        ({"prompt": "no-such-file.txt"}, "--prompt no-such-file.txt: there is no such file"),
        (
            {"prompt": "Two words.", "extras": {"sparse_prefill": "sale", "sparse_min_tokens": 0}},
            "tokens, and sale leaves fewer than 128 dense: give a longer prompt or another --chunk",
        ),
        ({"model": "no/such/folder/here"}, "no/such/folder/here"),
        ({"output": Path("no/such/folder/page.html")}, "there is no folder no/such/folder"),
        ({"more": ["--chunk", "100"]}, "--chunk 100: a multiple of 128 is allowed"),
        ({"more": ["--additional-config", '{"sparse": {"prefil": 1}}']}, "--additional-config: sparse.prefil is 1"),
    ],
    ids=str,
)
def test_wrong_inputs_are_explained(
    changes: dict[str, Any], message: str, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"prompt": prompt, "extras": BOTH, "output": tmp_path / "page.html", "model": MODEL, "more": [], **changes}
    with pytest.raises(SystemExit) as ended:
        main(arguments_of(given["prompt"], given["extras"], given["output"], *given["more"], model=given["model"]))
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error, error
    assert not given["output"].exists()


def test_the_answer_is_marked(tmp_path: Path) -> None:
    question = prompt_of(3, 1200)
    content = question.content
    output = tmp_path / "page.html"
    wanted = content.split()[40]
    main(arguments_of(content, BOTH, output, "--mark", wanted))
    page = output.read_text()
    marks = re.findall(r'class="mark" x="\d+" y="0" width="\d+" height="1"><title>keys \d+ to \d+: ([^<]*)<', page)
    assert len(marks) == content.count(wanted)
    assert all(wanted in mark for mark in marks)
    assert page.count('class="verdict"') == 2
