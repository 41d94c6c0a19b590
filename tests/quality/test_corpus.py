"""Real text: what is found, what is left out, and that long texts differ."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from random import Random
from typing import get_args

import pytest

from vllm_sparse.quality.corpus import Corpus, Kind, clean, functions_of, paragraphs_of

SENTENCE = "The lantern stands on a shelf of the small cabin near the lake where the ferry leaves in the morning. "


def words(text: str) -> int:
    """A tokenizer that knows words."""
    return len(text.split())


@pytest.fixture(scope="module")
def installed() -> Corpus:
    return Corpus.installed()


def test_the_installation_has_text_for_documents_of_32k_tokens(installed: Corpus) -> None:
    assert sum(map(len, installed.paragraphs)) > 200_000
    assert sum(len(function.source) for function in installed.functions) > 500_000


def test_nothing_is_there_twice(installed: Corpus) -> None:
    assert len(set(installed.paragraphs)) == len(installed.paragraphs)
    assert len({function.source for function in installed.functions}) == len(installed.functions)


def test_paragraphs_are_clean(installed: Corpus) -> None:
    for paragraph in installed.paragraphs:
        assert 100 <= len(paragraph) <= 700
        assert not re.search(r"[\x00-\x1f\x7f]|\d{5,}|  ", paragraph), paragraph


def test_functions_are_what_python_says_they_are(installed: Corpus) -> None:
    for function in Random(0).sample(installed.functions, 200):
        (node,) = ast.parse(function.source).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert node.name == function.name
        assert (ast.get_docstring(node) or "").strip() == function.docstring
        assert function.source.startswith(f"{function.signature}\n")


def test_a_function_inside_another_is_moved_to_the_margin_and_a_string_left_of_it_is_left_out() -> None:
    good = 'class A:\n    def good(self):\n        """What it does."""\n        x = 1\n        return x\n'
    bad = '    def bad(self):\n        x = """\nat the margin"""\n        y = x\n        return y\n'
    source = good + bad
    (function,) = functions_of(ast.parse(source), source)
    assert (function.name, function.docstring) == ("good", "What it does.")
    assert function.source == 'def good(self):\n    """What it does."""\n    x = 1\n    return x'


def test_prose_is_told_from_lists_tables_links_and_code() -> None:
    prose = "  " + SENTENCE.replace(" shelf", "\nshelf")
    others = [
        "| " + SENTENCE + " |.",
        "* " + SENTENCE,
        SENTENCE.strip()[:-1],
        SENTENCE + "See https://example.org for it.",
        SENTENCE + "It was built 12345 days ago.",
        "Short.",
    ]
    assert list(paragraphs_of("\n\n".join([*others, prose, *others]))) == [SENTENCE.strip()]


def test_a_long_paragraph_becomes_several_that_end_with_sentences() -> None:
    found = list(paragraphs_of(SENTENCE * 20))
    assert len(found) > 2
    assert " ".join(found) == (SENTENCE * 20).strip()
    assert all(len(each) <= 700 and each.endswith(".") for each in found)


def test_control_characters_are_taken_out() -> None:
    assert clean("a\x00b\r\nc\u200bd\x1b[0m\te") == "ab\ncd[0m   e"


@pytest.mark.parametrize("kind", get_args(Kind))
def test_long_texts_are_long_enough_differ_and_follow_from_the_seed(installed: Corpus, kind: Kind) -> None:
    texts = installed.texts(kind, 8192, 6, Random(3), words)
    assert all(words(text) >= 8192 for text in texts)
    assert texts == installed.texts(kind, 8192, 6, Random(3), words)
    assert texts != installed.texts(kind, 8192, 6, Random(4), words)
    openings = {text[:200] for text in texts}
    assert len(openings) == 6


def test_no_file_is_in_two_texts_while_others_were_in_none(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.md").write_text(f"file {number} " + "word " * 500)
    texts = Corpus.of_folder(tmp_path).texts("prose", 1000, 5, Random(0), words)
    named = [number for text in texts for number in re.findall(r"file (\d+) ", text)]
    assert len(named) == len(set(named))


def test_too_little_text_for_long_texts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text(SENTENCE * 30)
    with pytest.raises(ValueError, match=r"--text .*: 3,\d\d\d characters of prose found.*1,000 tokens need about"):
        Corpus.of_folder(tmp_path).texts("prose", 1000, 1, Random(0), words)
    with pytest.raises(ValueError, match="0 characters of code found"):
        Corpus.of_folder(tmp_path).texts("code", 1000, 1, Random(0), words)


def test_a_folder_is_read_with_the_folders_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.md").write_text(SENTENCE)
    (tmp_path / "b.py").write_text('def f(x):\n    """Doubles."""\n    y = 2 * x\n    return y\n')
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "f.md").write_text(SENTENCE.replace("lantern", "candle"))
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "d.bin").write_text(SENTENCE.replace("lantern", "kettle"))
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\xfa")
    corpus = Corpus.of_folder(str(tmp_path))
    assert corpus.paragraphs == (SENTENCE.strip(),)
    assert [function.name for function in corpus.functions] == ["f"]
    assert len(corpus.files["code"]) == 2
    assert "e.txt is left out: it is not utf-8" in caplog.text


def test_a_folder_without_text_is_an_error_that_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("text")
    with pytest.raises(ValueError, match=r"no text in utf-8 found; needed are files that end in one of .*\.md"):
        Corpus.of_folder(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        Corpus.of_folder(tmp_path / "missing")
