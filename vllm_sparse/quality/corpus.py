"""Real text to make tasks and language measures of: what every Python installation brings, or a folder of the user's.

Nothing is downloaded, and no module is imported to read it. What an installation brings differs between machines; on
one machine it is the same every time, so that a seed decides everything that is made of it.
"""

from __future__ import annotations

import ast
import logging
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Literal

Kind = Literal["code", "prose"]

PROSE_SUFFIXES = frozenset({".txt", ".md", ".rst"})
_CODE_SUFFIXES = """
.py .json .js .ts .c .h .cc .cpp .hpp .cu .cuh .go .rs .java .rb .sh .toml .yaml .yml .ini .cfg .html .css .sql
"""
CODE_SUFFIXES = frozenset(_CODE_SUFFIXES.split())

# Parts of the standard library that are tests, tables or copies of older code rather than text that people read.
_LEFT_OUT_NAMES = """
test tests idlelib lib2to3 site-packages dist-packages turtledemo encodings pydoc_data ensurepip __pycache__
"""
_LEFT_OUT = frozenset(_LEFT_OUT_NAMES.split())
# Enough for 40 documents of 32K tokens that differ, and read in about two seconds.
_ENOUGH_CODE_CHARS = 3_000_000
_ENOUGH_DESCRIPTION_CHARS = 4_000_000
_FILE_CHARS = 50_000  # of one file in one long text, so that no text is a single file

_FUNCTION_LINES = (4, 60)
_FUNCTION_CHARS = 3_000
_PARAGRAPH_CHARS = (100, 700)
_PARAGRAPH_WORDS = 15
_LETTERS_OF_PROSE = 0.9  # share of letters, spaces and plain punctuation; tables, badges and code have less
_NOT_PROSE = re.compile(r"https?://|[<>|{}\\]|==|\d{5,}")
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028\u2029\ufeff\ufffd]")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Function:
    """A Python function as it stands in a file, moved to the left margin.

    Attributes:
        name: of the function or method.
        signature: the lines from ``def`` to the colon.
        docstring: cleaned of its indentation; "" if there is none.
        source: all lines, without decorators.
    """

    name: str
    signature: str
    docstring: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Real text.

    Attributes:
        origin: where it comes from, as errors name it.
        paragraphs: of prose, one line each, 100 to 700 characters, all different.
        functions: of Python, 4 to 60 lines, all different.
        files: whole files of each kind.
    """

    origin: str
    paragraphs: tuple[str, ...]
    functions: tuple[Function, ...]
    files: Mapping[Kind, tuple[str, ...]]

    @staticmethod
    def installed() -> Corpus:
        """Standard library, its licence, and what the installed distributions say of themselves; read once."""
        return _installed()

    @staticmethod
    def of_folder(folder: str | Path) -> Corpus:
        """Text files of a folder and the folders in it, utf-8; hidden ones are left out.

        Raises:
            ValueError: there is no such folder, or no text in it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"--text {folder}: there is no such folder; name one that holds text files")
        files: dict[Kind, list[str]] = {"code": [], "prose": []}
        python: list[str] = []
        for path in sorted(folder.rglob("*")):
            suffix = path.suffix.lower()
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                continue
            if suffix not in PROSE_SUFFIXES | CODE_SUFFIXES or not path.is_file():
                continue
            try:
                text = clean(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                _logger.warning("%s is left out: it is not utf-8", path)
                continue
            files["prose" if suffix in PROSE_SUFFIXES else "code"].append(text)
            if suffix == ".py":
                python.append(text)
        if not any(text.strip() for texts in files.values() for text in texts):
            suffixes = " ".join(sorted(PROSE_SUFFIXES | CODE_SUFFIXES))
            raise ValueError(f"--text {folder}: no text in utf-8 found; needed are files that end in one of {suffixes}")
        return _corpus(f"--text {folder}", python, files)

    def texts(
        self, kind: Kind, tokens: int, count: int, rng: Random, count_text_tokens: Callable[[str], int]
    ) -> list[str]:
        """Long texts, each of real files one after another, in an order of its own.

        No file is in two texts before every file has been in one.

        Args:
            kind: ``code`` or ``prose``.
            tokens: of each text, at least.
            count: of texts.
            rng: decides which files.
            count_text_tokens: tokens of a text.

        Raises:
            ValueError: there is less than twice as much text as one of them needs, so that two would be nearly equal.
        """
        pieces = [piece for text in self.files[kind] for piece in _pieces(text)]
        available_chars = sum(map(len, pieces))
        order: list[str] = []
        found = []
        chars_per_token = 4.0
        for _ in range(count):
            chosen: list[str] = []
            chars = 0
            while True:
                needed_chars = tokens * chars_per_token * 1.02
                if 2 * needed_chars > available_chars:
                    raise ValueError(
                        f"{self.origin}: {available_chars:,} characters of {kind} found, but different texts of"
                        f" {tokens:,} tokens need about {2 * needed_chars:,.0f}; add files or ask for shorter texts"
                    )
                while chars < needed_chars:
                    order = order or rng.sample(pieces, len(pieces))
                    chosen.append(order.pop())
                    chars += len(chosen[-1]) + 2
                text = "\n\n".join(chosen)
                text_tokens = count_text_tokens(text)
                if text_tokens >= tokens:
                    break
                chars_per_token = max(chars / max(text_tokens, 1), chars_per_token * 1.02)
            found.append(text)
        return found


def clean(text: str) -> str:
    """Text without control characters and invisible ones, lines ended by a line feed."""
    return _NOT_TEXT.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).expandtabs(4)


def paragraphs_of(text: str) -> Iterator[str]:
    """Paragraphs of a text that read as prose, each on one line; lists, tables, markup and code are left out.

    A paragraph that is longer than 700 characters becomes several, which end where sentences end.
    """
    for block in re.split(r"\n\s*\n", text):
        words = block.split()
        if len(words) < _PARAGRAPH_WORDS or not words[0][0].isupper() or words[-1][-1] not in ".!?:":
            continue
        for paragraph in _shortened(" ".join(words)):
            plain = sum(character.isalpha() or character in " .,;:!?'-" for character in paragraph)
            if (
                _PARAGRAPH_CHARS[0] <= len(paragraph) <= _PARAGRAPH_CHARS[1]
                and plain >= _LETTERS_OF_PROSE * len(paragraph)
                and not _NOT_PROSE.search(paragraph)
            ):
                yield paragraph


def _shortened(paragraph: str) -> Iterator[str]:
    while len(paragraph) > _PARAGRAPH_CHARS[1]:
        end = paragraph.rfind(". ", 0, _PARAGRAPH_CHARS[1]) + 1
        if not end:
            return
        yield paragraph[:end]
        paragraph = paragraph[end:].lstrip()
    yield paragraph


def functions_of(tree: ast.Module, source: str) -> Iterator[Function]:
    """Functions and methods of a parsed file that are of a length to be read among others."""
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
            continue
        if not _FUNCTION_LINES[0] <= node.end_lineno - node.lineno + 1 <= _FUNCTION_LINES[1]:
            continue
        own = lines[node.lineno - 1 : node.end_lineno]
        margin = " " * node.col_offset
        # A function inside a line, or a string whose lines begin left of it, cannot be moved.
        if not own[0].lstrip().startswith(("def ", "async ")) or any(
            line.strip() and not line.startswith(margin) for line in own
        ):
            continue
        own = [line[len(margin) :].rstrip() for line in own]
        signature = "\n".join(own[: node.body[0].lineno - node.lineno])
        text = "\n".join(own)
        if signature and len(text) <= _FUNCTION_CHARS:
            yield Function(node.name, signature, (ast.get_docstring(node) or "").strip(), text)


def _pieces(text: str) -> Iterator[str]:
    """A file, cut at line ends where it is long."""
    while len(text) > _FILE_CHARS:
        end = text.rfind("\n", 0, _FILE_CHARS) + 1 or _FILE_CHARS
        yield text[:end]
        text = text[end:]
    if text.strip():
        yield text


def _docstrings_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _corpus(origin: str, python: Iterable[str], files: Mapping[Kind, list[str]]) -> Corpus:
    """A corpus of files, of which `python` are parsed."""
    functions: dict[str, Function] = {}
    documentation: list[str] = []
    for source in python:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # of another Python version: it stays text, without functions
            continue
        functions |= {function.source: function for function in functions_of(tree, source)}
        documentation += _docstrings_of(tree)
    paragraphs = {paragraph: None for text in [*documentation, *files["prose"]] for paragraph in paragraphs_of(text)}
    return Corpus(
        origin, tuple(paragraphs), tuple(functions.values()), {kind: tuple(texts) for kind, texts in files.items()}
    )


@cache
def _installed() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)]
    # By a checksum of the name: any part of the list is a mixture of all packages, the same on every run.
    paths.sort(key=lambda path: (zlib.crc32(path.relative_to(root).as_posix().encode()), path))
    python: list[str] = []
    chars = 0
    for path in paths:
        if chars >= _ENOUGH_CODE_CHARS:
            break
        try:
            python.append(clean(path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
        chars += len(python[-1])
    prose: dict[str, None] = {}
    licence = root / "LICENSE.txt"
    if licence.is_file():
        prose[clean(licence.read_text(encoding="utf-8"))] = None
    topics = root / "pydoc_data" / "topics.py"  # the language reference, as `help()` prints it
    if topics.is_file():
        # A text a topic: they are the values of one dictionary.
        prose |= {
            clean(node.value): None
            for node in ast.walk(ast.parse(topics.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value
        }
    prose |= _descriptions()
    return _corpus("installed text", python, {"code": python, "prose": list(prose)})


def _descriptions() -> dict[str, None]:
    """Descriptions and licences of the installed distributions, by name; each once."""
    found: dict[str, None] = {}
    chars = 0
    for distribution in sorted(metadata.distributions(), key=lambda each: str(each.metadata["Name"]).lower()):
        if chars >= _ENOUGH_DESCRIPTION_CHARS:
            break
        _, _, description = (distribution.read_text("METADATA") or "").partition("\n\n")
        texts = [description]
        texts += [
            path.read_binary().decode("utf-8", "replace")  # what is not utf-8 is left out by `clean`
            for path in distribution.files or ()
            if path.suffix in ("", ".txt") and "LICEN" in path.name.upper() and Path(str(path.locate())).is_file()
        ]
        for text in texts:
            if (cleaned := clean(text)) and cleaned not in found:
                found[cleaned] = None
                chars += len(cleaned)
    return found
