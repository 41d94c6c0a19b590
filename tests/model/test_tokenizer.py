"""The small model's tokenizer, alone and as transformers loads it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.text.needles import filler, needle_prompt
from loadtest.text.tokenizer import BEGIN, END, SPECIALS, build_tokenizer, chat_text, count_tokens, save_tokenizer
from loadtest.text.words import KEY_NOUNS

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(TOKENIZER, folder, 34816)
    # The class that AutoTokenizer picks depends on the model beside the tokenizer.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    if any(special in text for special in SPECIALS):
        return
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids) == text


def test_ordinary_text_round_trips() -> None:
    text = filler(random.Random(0), 2000)
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids) == text


def test_keys_are_one_token() -> None:
    assert all(count_tokens(TOKENIZER, f" {key}") == 1 for key in KEY_NOUNS)


def test_numbers_are_grouped_from_the_left_with_the_space() -> None:
    tokens = TOKENIZER.encode("The code of the harbour is 48213.", add_special_tokens=False).tokens
    assert tokens == ["The", "Ġcode", "Ġof", "Ġthe", "Ġharbour", "Ġis", "Ġ482", "13", "."]


def test_vocabulary_is_small_and_aligned() -> None:
    assert TOKENIZER.get_vocab_size() % 64 == 0
    assert 4000 <= TOKENIZER.get_vocab_size() <= 5120


def test_transformers_gives_the_same_tokens(loaded: Any) -> None:
    text = needle_prompt(random.Random(1), 600, lambda part: count_tokens(TOKENIZER, part), 3, 2).content
    assert loaded.encode(text) == TOKENIZER.encode(text).ids
    assert loaded.encode(text)[0] == loaded.bos_token_id == SPECIALS.index(BEGIN)
    assert loaded.encode(text, add_special_tokens=False) == TOKENIZER.encode(text, add_special_tokens=False).ids
    assert loaded.eos_token_id == SPECIALS.index(END)
    assert loaded.pad_token_id == 0
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text


def test_chat_template(loaded: Any) -> None:
    messages = [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Why?"},
    ]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>\nYou answer.<|end|>\n<|user|>\nWhat?<|end|>\n<|assistant|>\nThat.<|end|>\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    )
    numbers = loaded.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert numbers.count(loaded.bos_token_id) == 1
    assert numbers == TOKENIZER.encode(text, add_special_tokens=False).ids


def test_chat_text_is_the_template(loaded: Any) -> None:
    message = [{"role": "user", "content": "What?\nWhy?"}]
    assert chat_text("What?\nWhy?") == loaded.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
