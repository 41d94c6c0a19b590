"""The text of each token, with tokenizers that know the characters of their tokens and with such that do not."""

from __future__ import annotations

import io
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer
from transformers.tokenization_mistral_common import MistralCommonBackend

from tests.inspect.test_command import BOTH, MODEL, arguments_of
from tests.serving.server import prompt_of
from vllm_sparse.calibration.prompts import task_prompts
from vllm_sparse.inspect.command import main
from vllm_sparse.inspect.words import read_words

TEXT = "The  Café is “naïve” — 日本 🙂. Right, the mason said so.\n\nOK"
PROMPT = prompt_of(3, 300).content
SHORT = PROMPT[:600]
# Bytes; pieces that keep letters; pieces of small letters without signs.
SLOW = ("ByT5Tokenizer", "GPTSw3Tokenizer", "SiglipTokenizer")


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A sentencepiece model of words of the prompt and of bytes."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPT.split(". ")),
        model_writer=written,
        vocab_size=500,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pieces: bytes) -> dict[str, Path]:
    """The bundled model with other tokenizers."""
    parent = tmp_path_factory.mktemp("models")
    held: dict[str, dict[str, bytes]] = {name: {"spiece.model": pieces} for name in SLOW}
    vocabulary = {piece: number for number, piece in enumerate(("<unk>", "h", "e</w>", "he</w>", "T@@", "e"))}
    held["CTRLTokenizer"] = {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": b"#version\nh e</w>\n\n"}
    for name, contents in held.items():
        folder = parent / name
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            (folder / file).symlink_to(MODEL / file)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "model_max_length": 9999}))
        for file, content in contents.items():
            (folder / file).write_bytes(content)
    return {name: parent / name for name in held}


def slow(folder: Path) -> Any:
    """A tokenizer that knows no characters."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not tokenizer.is_fast
    assert type(tokenizer).__name__ == folder.name
    return tokenizer


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("text", [TEXT, PROMPT], ids=["signs", "prompt"])
def test_decoded_words_are_the_tokens(folders: dict[str, Path], name: str, text: str) -> None:
    tokenizer = slow(folders[name])
    found = read_words(tokenizer, text)
    assert found.tokens == tokenizer(text)["input_ids"]
    assert found.text == tokenizer.decode(found.tokens)
    words = found.words()
    assert "".join(words) == found.text
    assert len(words) == len(found.tokens)
    told = 0
    for token, place in zip(found.tokens, found.places, strict=True):
        # A part of a character, or a space, decodes alone to nothing that could be compared.
        alone = tokenizer.decode([token]).strip()
        if alone and alone.isascii():
            assert found.text[slice(*place)].strip() == alone
            told += 1
    assert told > len(text) // 8


@pytest.mark.parametrize("name", SLOW)
def test_tokens_of_a_character_share_its_place(folders: dict[str, Path], name: str) -> None:
    found = read_words(slow(folders[name]), TEXT)
    place = found.text.index("🙂")
    of_it = [number for number, (start, stop) in enumerate(found.places) if start <= place < stop]
    assert len(of_it) >= 4
    assert of_it == [*range(of_it[0], of_it[-1] + 1)]


def test_a_tokenizer_that_does_not_say_what_it_knows() -> None:
    """Models of Mistral bring it; it has no `is_fast`."""
    tekken = files("mistral_common") / "data" / "tekken_240718.json"
    tokenizer = MistralCommonBackend(tokenizer_path=str(tekken))
    found = read_words(tokenizer, TEXT)
    assert found.text == f"<s>{TEXT}"
    assert "".join(found.words()) == found.text
    assert found.words()[:5] == ["<s>", "The", " ", " Café", " is"]


def test_each_character_is_said_once() -> None:
    """Where the tokenizer knows them."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.is_fast
    found = read_words(tokenizer, TEXT)
    assert found.text == TEXT
    assert "".join(found.words()) == TEXT
    assert len(found.tokens) > len(set(found.places))


@pytest.mark.parametrize("name", SLOW)
def test_a_page_is_written_with_such_a_tokenizer(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    output = tmp_path / "page.html"
    main(arguments_of(SHORT, BOTH, output, "--mark", "salmon", model=folders[name]))
    marks = re.findall(
        r'class="mark" x="\d+" y="0" width="\d+" height="1"><title>keys \d+ to \d+: ([^<]*)<', output.read_text()
    )
    assert [mark.strip() for mark in marks] == ["salmon"]


@pytest.mark.parametrize(
    ("name", "mark", "message"),
    [
        ("SiglipTokenizer", "Martha", "--mark 'Martha': the model's tokenizer writes it otherwise"),
        (
            "CTRLTokenizer",
            "salmon",
            "CTRLTokenizer, knows no characters, and its tokens decode to other text one by one",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    mark: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments_of(f"The he. {SHORT}", BOTH, tmp_path / "page.html", "--mark", mark, model=folders[name]))
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_questions_are_written_with_such_a_tokenizer(folders: dict[str, Path]) -> None:
    """Calibrations and quality ask for tokens alone."""
    tokenizer = slow(folders["ByT5Tokenizer"])
    (prompt,) = task_prompts(str(folders["ByT5Tokenizer"]), ["one_needle"], 4096, 1, seed=0)
    assert 3900 < len(prompt.tokens) <= 4096
    assert prompt.task.answer_prefix in tokenizer.decode(prompt.tokens)
