"""Prompts that share a document's cached blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.quality.measures.answers import FRESH_TOKENS, apart_at_the_end


@given(st.integers(0, 3 * FRESH_TOKENS), st.lists(st.integers(1, 50), min_size=1, max_size=9))
def test_prompts_part_a_fresh_length_before_their_questions(common: int, questions: list[int]) -> None:
    text = list(range(100, 100 + common))
    prompts = [[*text, *[-1 - number] * length] for number, length in enumerate(questions)]
    apart = apart_at_the_end(prompts)
    kept = max(common - FRESH_TOKENS, 0) if len(questions) > 1 else 0
    for number, (before, after) in enumerate(zip(prompts, apart, strict=True)):
        assert len(before) - len(after) == min(number, len(before) - kept)
        assert after[:kept] == text[:kept]
        if number and common >= FRESH_TOKENS + number:
            # The next token is another one than the first prompt's, so that no later block is shared.
            assert after[kept] != apart[0][kept]
            assert after[kept:] == before[kept + number :]
