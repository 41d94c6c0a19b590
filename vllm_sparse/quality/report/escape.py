"""Texts from models and users in a page: none of them may end up as anything but text."""

from __future__ import annotations

import html
import unicodedata


def escaped(value: object) -> str:
    """HTML of a text, between tags or quotes; characters that hide or turn the line around are written out."""
    return html.escape("".join(map(_visible, str(value))), quote=True)


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return f"\\u{ord(character):04x}" if kind in ("Cc", "Cf") and character not in "\n\t" else character
