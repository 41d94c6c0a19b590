"""A long conversation about a document, of which the model says only the answers: what a generation is measured on.

    python -m loadtest.quality.conversation --tokens 15800 --generated 400 --count 3 > prompts.jsonl

prints conversations with the right answers, as prompts for `vllm-sparse calibrate`.

Left alone, the bundled model repeats one sentence after a few turns, whatever its attention reads. With the user's
turns given, each of thousands of generated tokens is either part of a question never asked before or part of an
answer that has to be fetched from the document, so that what a decode method loses shows, and two generations that
have parted come together again at the next question.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from loadtest.text.needles import ANSWER_FORM, QUESTION_SEPARATOR, ask, needle_prompt
from loadtest.text.tokenizer import END, build_tokenizer, chat_text, count_tokens

# Tokens of a turn at least: nine of the answer, and a short question with the chat's marks around it.
LEAST_TURN_TOKENS = 24
# Tokens of ", the key" in a question about many keys, which takes room in `needle_prompt` and is not asked here.
LISTED_KEY_TOKENS = 3
FREE = -1
"""In a script: a token that the model chooses."""


@dataclass(frozen=True)
class Answer:
    """Where an answer is generated, and what is right.

    Attributes:
        start: its first position in the generation.
        tokens: the answer in the wording that the model was taught.
        value: five digits.
    """

    start: int
    tokens: list[int]
    value: str

    @property
    def place(self) -> slice:
        """Its positions in the generation."""
        return slice(self.start, self.start + len(self.tokens))


@dataclass(frozen=True)
class Conversation:
    """A prompt and what follows it.

    Attributes:
        prompt: token ids of the document and the first question, up to where the first answer begins.
        script: one entry a generated token: the token of a question or mark, or `FREE` in an answer.
        answers: in the order of the script.
    """

    prompt: list[int]
    script: list[int]
    answers: list[Answer]

    @property
    def right(self) -> list[int]:
        """The whole conversation with the right answers, prompt included."""
        generated = list(self.script)
        for answer in self.answers:
            generated[answer.place] = answer.tokens
        return self.prompt + generated


def conversation(rng: random.Random, tokenizer: Tokenizer, prompt_tokens: int, generated_tokens: int) -> Conversation:
    """A fresh conversation of whole turns; each asks for another needle of the document.

    Args:
        rng: the source of every choice.
        tokenizer: of the bundled model.
        prompt_tokens: tokens of the prompt, met to within a few sentences.
        generated_tokens: tokens of the script, at most.

    Raises:
        ValueError: the needles do not fit into the prompt, there are too few keys, or no turn fits into the script.
    """
    if generated_tokens < LEAST_TURN_TOKENS:
        raise ValueError(f"{generated_tokens} generated tokens hold no turn of {LEAST_TURN_TOKENS} and more")
    turns = generated_tokens // LEAST_TURN_TOKENS
    document = needle_prompt(
        rng,
        prompt_tokens + LISTED_KEY_TOKENS * turns,
        lambda text: count_tokens(tokenizer, text),
        needles=turns,
        asked=turns,
    )

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    questions = [ask(rng, [key]) for key in document.keys]
    script: list[int] = []
    answers: list[Answer] = []
    for turn, (key, value) in enumerate(zip(document.keys, document.answers, strict=True)):
        lead = ids(f"{END}\n<|user|>\n{questions[turn]}{END}\n<|assistant|>\n") if turn else []
        answer = ids(ANSWER_FORM.format(key=key, value=value))
        if len(script) + len(lead) + len(answer) > generated_tokens:
            break
        answers.append(Answer(len(script) + len(lead), answer, value))
        script += lead + [FREE] * len(answer)
    return Conversation(ids(chat_text(document.text + QUESTION_SEPARATOR + questions[0])), script, answers)


def is_right(answer: Answer, generated: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether an answer's tokens hold the value as a number of its own.

    Args:
        answer: which.
        generated: tokens of the whole generation.
        tokenizer: of the bundled model.
    """
    text = tokenizer.decode(list(generated[answer.place]))
    return answer.value in re.findall(r"\d+", text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=15800, help="before the first answer")
    parser.add_argument("--generated", type=int, default=400, help="tokens of the answers and the other questions")
    parser.add_argument("--count", type=int, default=3, help="conversations")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = build_tokenizer()
    for number in range(arguments.count):
        rng = random.Random(arguments.seed + number)
        talk = conversation(rng, tokenizer, arguments.tokens, arguments.generated)
        # The tokenizer puts the first token in front by itself.
        print(json.dumps(tokenizer.decode(talk.right[1:], skip_special_tokens=False)))


if __name__ == "__main__":
    main()
