"""Tokens counted as the served model counts them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from loadtest.load.http import HttpError, Server
from loadtest.quality.tasks.task import CountTokens

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


def served_counter(server: Server, model: str) -> CountTokens:
    """Counts with the server's ``/tokenize``.

    Raises (when counting):
        LookupError: the server has no such route, or refuses.
    """

    def count(text: str) -> int:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            return int(server.post("/tokenize", body)["count"])
        except (HttpError, KeyError, TypeError, ValueError) as error:
            raise LookupError(f"{server.url} does not count tokens ({error}): name --tokenizer") from None

    return count


def model_counter(server: Server, model: str, root: str | None) -> CountTokens:
    """The quickest counter that there is: of the model's folder where the server names a local one, else the server.

    Args:
        server: that serves it.
        model: served name.
        root: the model's folder or name, as ``/v1/models`` says it.
    """
    if root is not None and (Path(root) / "tokenizer.json").is_file():
        return local_counter(Path(root))
    return served_counter(server, model)


def estimated_counter(count_tokens: CountTokens, sample: str) -> CountTokens:
    """Counts by the characters, at the sample's tokens per character: for texts counted in thousands of pieces."""
    sample = sample[:SAMPLE_CHARACTERS]
    ratio = count_tokens(sample) / len(sample)
    return lambda text: round(len(text) * ratio)
