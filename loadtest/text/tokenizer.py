"""The small model's tokenizer: whole words, numbers in groups of three digits, and bytes for everything else.

It is a byte-level BPE without merges: a piece that the vocabulary holds as a whole is one token (`ignore_merges`), any
other piece is spelled byte by byte, so that every text round-trips. A space stays with the word or the number that
follows it, so that " 48213" is " 482", "13".
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing

from loadtest.text import words

BEGIN = "<|begin|>"
END = "<|end|>"
PAD = "<|pad|>"
SPECIALS = (PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>")

# The vocabulary is filled up to a multiple of this with reserved special tokens: GPU kernels like such widths.
VOCABULARY_MULTIPLE = 64

CHAT_TEMPLATE = (
    "{{- '<|begin|>' }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)

# Contractions, words and up to three digits with the space before them, one sign, line breaks, other white space.
_PIECES = r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = (".", ",", "?", "!", ":", ";", "'", '"', "-", "(", ")", "/", "&", "%", "$", "*", "+", "=", "#", "'s", "'t")


def _vocabulary() -> list[str]:
    """Every ordinary token in the byte-level alphabet, each once; single bytes come first."""
    space, line = "\u0120", "\u010a"
    tokens = sorted(ByteLevel.alphabet())
    tokens += [line * 2, line * 3, space * 2, space * 4]
    tokens += [f"{number:0{digits}d}" for digits in (1, 2, 3) for number in range(10**digits)]
    tokens += [f"{space}{number}" for number in range(1_000)]
    tokens += [lead + sign for sign in _SIGNS for lead in ("", space)]
    lower = (
        *words.FUNCTION_WORDS,
        *words.PREPOSITIONS,
        *words.ADVERBS,
        *words.KEY_NOUNS,
        *words.MOTION_VERBS,
        *words.ACTION_VERBS,
        *words.ADJECTIVES,
    )
    tokens += [space + word for word in lower]
    openers = (*words.FUNCTION_WORDS, *words.PREPOSITIONS)
    tokens += openers
    # Words that begin a sentence stand at the beginning of a line or after a space.
    capitals = (*(word.capitalize() for word in openers), *words.NAMES, *words.WEEKDAYS, *words.MONTHS)
    tokens += [lead + word for word in capitals for lead in ("", space)]
    return list(dict.fromkeys(tokens))


def build_tokenizer() -> Tokenizer:
    """The tokenizer; specials take the first ids, and encoding with special tokens puts `BEGIN` in front."""
    tokens = [*SPECIALS, *_vocabulary()]
    missing = -len(tokens) % VOCABULARY_MULTIPLE
    reserved = [f"<|reserved_{number}|>" for number in range(missing)]
    vocabulary = {token: number for number, token in enumerate([*tokens, *reserved])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(_PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIALS, *reserved)]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return tokenizer


def chat_text(content: str) -> str:
    """A conversation of one user message as `CHAT_TEMPLATE` renders it, up to where the model answers."""
    return f"{BEGIN}<|user|>\n{content}{END}\n<|assistant|>\n"


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of `text` without special tokens around it."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers.AutoTokenizer loads, into `folder`.

    Args:
        tokenizer: from `build_tokenizer`.
        folder: an existing folder.
        longest: the model's context length in tokens.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
