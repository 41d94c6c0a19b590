"""Tokens counted as the served model counts them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

from tokenizers import Tokenizer

from loadtest.quality.tasks.task import CountTokens

REQUEST_SECONDS = 60.0
# Generated text is alike throughout, so a sample of this length tells its tokens per character.
SAMPLE_CHARACTERS = 20_000


def local_counter(folder: Path) -> CountTokens:
    """Counts with the tokenizer.json of a model's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def served_counter(url: str, model: str, headers: dict[str, str]) -> CountTokens:
    """Counts with the server's ``/tokenize``.

    Raises (when counting):
        LookupError: the server has no such route, or refuses.
    """

    def count(text: str) -> int:
        body = json.dumps({"model": model, "prompt": text, "add_special_tokens": False}).encode()
        request = urllib.request.Request(f"{url}/tokenize", body, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                return int(json.load(response)["count"])
        except (OSError, ValueError, KeyError) as error:
            raise LookupError(f"{url}/tokenize does not count tokens ({error})") from None

    return count


def model_counter(url: str, model: str, root: str | None, headers: dict[str, str]) -> CountTokens:
    """The quickest counter that there is: of the model's folder where the server names a local one, else the server.

    Args:
        url: of the server.
        model: served name.
        root: the model's folder or name, as ``/v1/models`` says it.
        headers: of requests to the server.
    """
    if root is not None and (Path(root) / "tokenizer.json").is_file():
        return local_counter(Path(root))
    return served_counter(url, model, headers)


def estimated_counter(count_tokens: CountTokens, sample: str) -> CountTokens:
    """Counts by the characters, at the sample's tokens per character: for texts counted in thousands of pieces."""
    sample = sample[:SAMPLE_CHARACTERS]
    ratio = count_tokens(sample) / len(sample)
    return lambda text: round(len(text) * ratio)
