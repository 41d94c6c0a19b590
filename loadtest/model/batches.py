"""Training batches made on the device: needles put into windows of filler, followed by questions and answers.

Every sample is a row of pieces (a stretch of filler, a needle, part of a question, an answer), and every piece is a
stretch of one long tensor, the bank. A batch is then one ragged gather: no Python loop runs over samples or tokens.
The joints are those of `loadtest.text.needles` and the chat template, token for token.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from loadtest.text.needles import (
    ANSWER_FORM,
    MULTI_QUESTION_FORMS,
    NEEDLE_FORMS,
    QUESTION_FORMS,
    QUESTION_SEPARATOR,
    SYSTEM_PROMPT,
)
from loadtest.text.tokenizer import BEGIN, END, PAD
from loadtest.text.words import KEY_NOUNS

# Placeholders in the bank, replaced by a piece's key and by the two tokens of its value.
KEY, HIGH, LOW = -1, -2, -3
MOST_KEYS_ASKED = 4
SYSTEM_SHARE = 0.1
MULTI_SHARE = 0.15
FEW_SHARE = 0.2
# The value's tokens are what the answer is about; the words around them are soon learnt.
VALUE_WEIGHT = 3.0


@dataclass(frozen=True)
class Mixture:
    """What a batch is made of.

    Attributes:
        length: tokens of a sample.
        batch: samples.
        needles: most needles of a sample.
        asked: most keys asked for in a sample.
        main_share: probability of the main phrasing.
        plain_share: probability of a completion without a chat, whose answers are recited one after the other.
    """

    length: int
    batch: int
    needles: int
    asked: int
    main_share: float = 0.5
    plain_share: float = 0.2


@dataclass(frozen=True)
class Batch:
    """Training tokens and where the values are; L = length, B = batch, A = answers of a sample.

    Attributes:
        inputs: [B, L] tokens.
        targets: [B, L] the tokens after them.
        answer_weight: [B, L] weight of a target in the loss on answers.
        filler_weight: [B, L] weight of a target in the loss on everything else.
        value_at: [B, A] where in `targets` the first of an answer's two value tokens stands.
        valid: [B, A] whether there is such an answer.
        form: [B, A] phrasing of the needle asked for.
        distance: [B, A] tokens between the needle's value and the answer's.
        keys_asked: [B, A] keys of the question that the answer belongs to.
        needles: [B] needles in the sample.
        plain: [B] whether the sample is a completion without a chat.
    """

    inputs: Tensor
    targets: Tensor
    answer_weight: Tensor
    filler_weight: Tensor
    value_at: Tensor
    valid: Tensor
    form: Tensor
    distance: Tensor
    keys_asked: Tensor
    needles: Tensor
    plain: Tensor


class BatchMaker:
    """Makes batches from a pool of filler.

    Args:
        tokenizer: of `loadtest.text.tokenizer`.
        pool: [T] tokens of `loadtest.text.needles.filler`, several texts after each other.
        device: where the batches are made.
        seed: of everything random here.
    """

    def __init__(self, tokenizer: Tokenizer, pool: NDArray[np.int32], device: torch.device, seed: int) -> None:
        self._tokenizer = tokenizer
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        numbers = tokenizer.get_vocab()
        stop, line, self._pad = numbers["."], numbers["\u010a\u010a"], numbers[PAD]
        tokens = torch.from_numpy(pool).to(device)
        # Needles go where a sentence ends; documents begin after an empty line.
        self._ends = torch.nonzero(tokens.eq(stop)).squeeze(1) + 1
        self._starts = torch.nonzero(tokens.eq(line)).squeeze(1) + 1
        self._pool_size = len(pool)
        # On the host too: how many starts leave room for a window, asked for each batch without waiting for the device.
        self._host_starts = self._starts.cpu().numpy()
        self._keys = torch.tensor([numbers[f"\u0120{key}"] for key in KEY_NOUNS], device=device)
        self._high = torch.tensor([numbers[f"\u0120{n}"] for n in range(100, 1000)], device=device)
        self._low = torch.tensor([numbers[f"{n:02d}"] for n in range(100)], device=device)

        self._pieces: list[tuple[list[int], list[float], list[float]]] = []
        self._empty = self._add("")
        chat = f"{BEGIN}<|user|>\n"
        self._prefix_chat = self._add(chat)
        self._prefix_system = self._add(f"{BEGIN}<|system|>\n{SYSTEM_PROMPT}{END}\n<|user|>\n")
        self._prefix_plain = self._add(BEGIN)
        self._needle = self._group([" " + form for form in NEEDLE_FORMS])
        self._separator = self._add(QUESTION_SEPARATOR)
        self._next_turn = self._add(f"{END}\n<|user|>\n", answer=2)
        reply = f"{END}\n<|assistant|>\n"
        self._question = self._group([form + reply for form in QUESTION_FORMS])
        self._opening = self._group([opening for opening, _ in MULTI_QUESTION_FORMS])
        self._item = self._group([" the {key}", ", the {key}", " and the {key}"])
        self._closing = self._group([closing + reply for _, closing in MULTI_QUESTION_FORMS])
        # Answers and recited sentences, each first as the beginning of a line, then after a space.
        everything = 1_000
        self._answer = self._group([lead + ANSWER_FORM for lead in ("", " ")], answer=everything)
        self._recital = self._group([lead + ANSWER_FORM for lead in ("", " ")], answer=everything, after_key=True)
        self._final = self._add(f"{END}\n", answer=2)

        lengths = [len(piece) for piece, _, _ in self._pieces]
        self._length = torch.tensor(lengths, device=device)
        self._start = self._pool_size + self._length.cumsum(0) - self._length
        self._high_at = torch.tensor([p.index(HIGH) if HIGH in p else 0 for p, _, _ in self._pieces], device=device)
        added = torch.tensor([token for piece in self._pieces for token in piece[0]], dtype=tokens.dtype, device=device)
        self._bank = torch.cat((tokens, added))
        ones = torch.ones(len(pool), device=device)
        answer_weights = torch.tensor([weight for piece in self._pieces for weight in piece[1]], device=device)
        filler_weights = torch.tensor([weight for piece in self._pieces for weight in piece[2]], device=device)
        self._answer_bank = torch.cat((torch.zeros_like(ones), answer_weights))
        self._filler_bank = torch.cat((ones, filler_weights))

    def _add(self, text: str, answer: int = 0, after_key: bool = False) -> int:
        """Add a piece to the bank and return its number.

        The first `answer` tokens count in the loss on answers (with `after_key`, only those after the key), the others
        as filler; keys and values that nothing before them tells count nowhere.
        """
        example_key, example_value = KEY_NOUNS[0], "10213"
        encoded = self._tokenizer.encode(text.format(key=example_key, value=example_value), add_special_tokens=False)
        names = {f"\u0120{example_key}": KEY, f"\u0120{example_value[:3]}": HIGH, example_value[3:]: LOW}
        tokens = [names.get(token, number) for token, number in zip(encoded.tokens, encoded.ids, strict=True)]
        answer_weight, filler_weight = [], []
        for place, token in enumerate(tokens):
            known = place < answer and not (after_key and KEY in tokens[place:])
            answer_weight.append((VALUE_WEIGHT if token in (HIGH, LOW) else 1.0) if known else 0.0)
            filler_weight.append(1.0 if not known and token >= 0 else 0.0)
        self._pieces.append((tokens, answer_weight, filler_weight))
        return len(self._pieces) - 1

    def _group(self, texts: list[str], answer: int = 0, after_key: bool = False) -> int:
        """Add pieces with consecutive numbers and return the first number."""
        numbers = [self._add(text, answer, after_key) for text in texts]
        return numbers[0]

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self._device)

    def _below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self._generator, device=self._device)

    def _form(self, forms: int, main_share: float, *shape: int) -> Tensor:
        """Phrasings: 0 with probability `main_share`, else evenly one of the others."""
        other = 1 + self._below(forms - 1, *shape)
        return torch.where(self._random(*shape) < main_share, torch.zeros_like(other), other)

    def _needle_counts(self, mixture: Mixture) -> Tensor:
        """[B] needles per sample: a fifth of the samples has few, the others at least half of the most."""
        few = 1 + self._below(min(4, mixture.needles), mixture.batch)
        least = max(1, mixture.needles // 2)
        many = least + self._below(mixture.needles - least + 1, mixture.batch)
        return torch.where(self._random(mixture.batch) < FEW_SHARE, few, many)

    def __call__(self, mixture: Mixture) -> Batch:
        """A fresh batch.

        Raises:
            ValueError: the pool is too short for the mixture's length.
        """
        batch, most, device = mixture.batch, mixture.needles, self._device
        column = torch.arange(most, device=device)
        needles = self._needle_counts(mixture)
        present = column < needles[:, None]
        plain = self._random(batch) < mixture.plain_share

        # Each needle's key, value and phrasing, in the order of the document: [B, needles].
        key = self._keys[self._random(batch, len(KEY_NOUNS)).argsort(1)[:, :most]]
        high = self._high[self._below(len(self._high), batch, most)]
        low = self._low[self._below(len(self._low), batch, most)]
        form = self._form(len(NEEDLE_FORMS), mixture.main_share, batch, most)
        needle_piece = torch.where(present, self._needle + form, self._empty)

        # Questions: turn t asks for the `count` needles from `first` on, in a random order of the needles: [B, turns].
        turns = min(mixture.asked, most)
        order = (self._random(batch, most) + 2.0 * ~present).argsort(1)
        wished = torch.where(
            self._random(batch, turns) < MULTI_SHARE, 2 + self._below(MOST_KEYS_ASKED - 1, batch, turns), 1
        )
        first = wished.cumsum(1) - wished
        count = (needles.clamp(max=turns)[:, None] - first).clamp(min=0).minimum(wished)
        slot = torch.arange(MOST_KEYS_ASKED, device=device)
        asked = slot < count[..., None]
        rank = (first[..., None] + slot).clamp(max=most - 1)
        needle = order.gather(1, rank.flatten(1))

        def of_needle(values: Tensor) -> Tensor:
            """[B, turns, keys] of [B, needles]."""
            return values.gather(1, needle).view(batch, turns, MOST_KEYS_ASKED)

        beginning = torch.arange(turns, device=device) == 0
        live, multi, chat = count > 0, count > 1, ~plain[:, None]
        lead = torch.where(beginning, self._separator, torch.where(chat, self._next_turn, self._empty))
        question = self._question + self._form(len(QUESTION_FORMS), mixture.main_share, batch, turns)
        multi_form = self._form(len(MULTI_QUESTION_FORMS), mixture.main_share, batch, turns)
        opening = torch.where(multi, self._opening + multi_form, question)
        closing = torch.where(multi & chat, self._closing + multi_form, self._empty)
        last = slot == count[..., None] - 1
        item = self._item + torch.where(slot == 0, 0, torch.where(last, 2, 1))
        item = torch.where(asked & (multi & chat)[..., None], item, self._empty)
        spaced = ((slot > 0) | (plain[:, None, None] & ~beginning[:, None])).long()
        answer = torch.where(chat[..., None], self._answer, self._recital) + spaced
        answer = torch.where(asked, answer, self._empty)
        turn_pieces = torch.cat(
            (
                torch.where(live, lead, self._empty)[..., None],
                torch.where(live & chat, opening, self._empty)[..., None],
                item,
                closing[..., None],
                answer,
            ),
            dim=2,
        )
        fillers = [values[..., :1] for values in (of_needle(key), of_needle(high), of_needle(low))]
        turn_key, turn_high, turn_low = (
            torch.cat((one, one, of_needle(values), one, of_needle(values)), dim=2)
            for one, values in zip(fillers, (key, high, low), strict=True)
        )

        # The window of filler takes what the other pieces leave, cut at sentence ends.
        draw = self._random(batch)
        prefix = torch.where(draw < SYSTEM_SHARE, self._prefix_system, self._prefix_chat)
        prefix = torch.where(plain, self._prefix_plain, prefix)[:, None]
        final = torch.where(plain, self._empty, self._final)[:, None]
        fixed = torch.cat((prefix, needle_piece, turn_pieces.flatten(1), final), dim=1)
        room = (mixture.length + 1 - self._length[fixed].sum(1)).clamp(min=1)
        usable = int(np.searchsorted(self._host_starts, self._pool_size - mixture.length - 256))
        if not usable:
            raise ValueError(f"a pool of {self._pool_size} tokens is too short for samples of {mixture.length}")
        window = self._starts[self._below(usable, batch)]
        low_end = torch.searchsorted(self._ends, window, right=True)
        high_end = torch.maximum(low_end, torch.searchsorted(self._ends, window + room, right=True) - 1)
        # Absent needles go to the end, so that sorting does not crowd the others at the beginning.
        share = torch.where(present, self._random(batch, most), 1.0).sort(1).values
        cut = low_end[:, None] + (share * (high_end - low_end + 1)[:, None]).long()
        cut = self._ends[cut.minimum(high_end[:, None])]
        cut = torch.cat((window[:, None], cut, self._ends[high_end][:, None]), dim=1)

        # All pieces of a sample in their order: [B, S].
        nothing = torch.zeros_like(prefix)

        def in_order(before: Tensor, stretch: Tensor, needle_value: Tensor, turn: Tensor, after: Tensor) -> Tensor:
            mixed = torch.stack((stretch[:, :-1], needle_value), dim=2).flatten(1)
            return torch.cat((before, mixed, stretch[:, -1:], turn.flatten(1), after), dim=1)

        absent = torch.zeros(batch, most + 1, dtype=torch.long, device=device)
        start = in_order(
            self._start[prefix], cut[:, :-1], self._start[needle_piece], self._start[turn_pieces], self._start[final]
        )
        length = in_order(
            self._length[prefix],
            cut.diff(dim=1),
            self._length[needle_piece],
            self._length[turn_pieces],
            self._length[final],
        )
        piece_key = in_order(nothing, absent, key, turn_key, nothing)
        piece_high = in_order(nothing, absent, high, turn_high, nothing)
        piece_low = in_order(nothing, absent, low, turn_low, nothing)
        stop = length.cumsum(1)

        # The ragged gather: [B, length + 1].
        position = torch.arange(mixture.length + 1, device=device).expand(batch, -1).contiguous()
        piece = torch.searchsorted(stop, position, right=True).clamp(max=stop.shape[1] - 1)
        inside = position < stop[:, -1:]
        source = start.gather(1, piece) + position - (stop - length).gather(1, piece)
        source = torch.where(inside, source, 0)
        tokens = self._bank[source].long()
        tokens = torch.where(tokens == KEY, piece_key.gather(1, piece), tokens)
        tokens = torch.where(tokens == HIGH, piece_high.gather(1, piece), tokens)
        tokens = torch.where(tokens == LOW, piece_low.gather(1, piece), tokens)
        tokens = torch.where(inside, tokens, self._pad)

        # Where the values stand.
        offset = stop - length
        needle_at = offset[:, 2 : 2 + 2 * most : 2] + self._high_at[needle_piece]
        width = turn_pieces.shape[2]
        turn_offset = offset[:, 2 + 2 * most : -1].view(batch, turns, width)
        value_at = turn_offset[..., -MOST_KEYS_ASKED:] + self._high_at[answer]
        return Batch(
            inputs=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            answer_weight=(self._answer_bank[source] * inside)[:, 1:],
            filler_weight=(self._filler_bank[source] * inside)[:, 1:],
            value_at=(value_at - 1).clamp(max=mixture.length - 2).flatten(1),
            valid=(asked & (value_at < mixture.length)).flatten(1),
            form=of_needle(form).flatten(1),
            distance=(value_at - of_needle(needle_at)).flatten(1),
            keys_asked=count[..., None].expand(-1, -1, MOST_KEYS_ASKED).flatten(1),
            needles=needles,
            plain=plain,
        )
