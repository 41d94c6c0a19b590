"""How an answer is compared with what should have been said."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from vllm_sparse.quality.tasks.task import Task

_WORD = re.compile(r"\w+")
_INTEGER = re.compile(r"(?<![\w.])-?\d+(?![\w]|\.\d)")
# Thousands are set apart by some models: "12,345" says 12345.
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")


def score(task: Task, text: str) -> float:
    """How much of what should have been said was said.

    Args:
        task: the question.
        text: what the model said after `Task.answer_prefix`.

    Returns:
        0 to 1, by `Task.scoring`:

        * ``share_found``: share of the answers that occur as whole words, in any case.
        * ``number``: 1 if the first integer is the answer.
        * ``words_in_order``: length of the longest common subsequence of words over the number of words expected, where
          only as many words of the text count as are expected. One word that is left out costs one word; with the
          common beginning instead, it would cost all that follow, and a difference between two variants would depend
          on the place of one slip more than on how much was copied.
    """
    match task.scoring:
        case "share_found":
            return sum(_occurs(answer, text) for answer in task.answers) / len(task.answers)
        case "number":
            first = _INTEGER.search(_without_commas(text))
            return float(first is not None and int(first.group()) == int(task.answers[0]))
        case "words_in_order":
            expected = [word for answer in task.answers for word in words_of(answer)]
            return common_subsequence(expected, words_of(text)[: len(expected)]) / len(expected)


def words_of(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _without_commas(text: str) -> str:
    return _THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)


def _occurs(answer: str, text: str) -> bool:
    pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
    return re.search(pattern, _without_commas(text), re.IGNORECASE) is not None


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    A row of the usual table is one integer (Hyyrö, "Bit-Parallel LCS-length Computation Revisited", 2004): thousands of
    words take milliseconds, where a server would wait for the next request.
    """
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(first):
        places[word] |= 1 << place
    everywhere = (1 << len(first)) - 1
    # Bits of 0 are where a row of the table rises.
    row = everywhere
    for word in second:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & everywhere
    return len(first) - row.bit_count()
