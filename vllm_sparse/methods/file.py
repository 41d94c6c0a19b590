"""Files that a method's knob names: JSON, checked when it is read, and known by a digest of its bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

Contents = TypeVar("Contents")


@dataclass(frozen=True)
class MethodFile(Generic[Contents]):
    """A file as it was read.

    Attributes:
        contents: what it holds.
        digest: SHA-256 of its bytes.
    """

    contents: Contents
    digest: str


def read(path: str, contents: type[Contents], what: str) -> MethodFile[Contents]:
    """Read a file.

    Args:
        path: of the file.
        contents: a pydantic dataclass.
        what: the file's name in messages, such as ``SALE calibration``.

    Raises:
        ValueError: it cannot be read or holds something else.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from error
    try:
        held = TypeAdapter(contents).validate_json(content)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        raise ValueError(f"the file is no {what}: {place + ': ' if place else ''}{detail['msg']}") from error
    return MethodFile(held, hashlib.sha256(content).hexdigest())
