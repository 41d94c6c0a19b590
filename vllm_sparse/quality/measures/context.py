"""What all measures work with, and how they ask a variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.records import DENSE
from vllm_sparse.quality.served_model import ServedModel, Tokenizer
from vllm_sparse.quality.variants import DENSE_EXTRAS, Variant


@dataclass(frozen=True)
class Context:
    """A run's model and texts.

    Attributes:
        model: asked.
        tokenizer: the model's.
        corpus: real text.
        seed: of all that is drawn.
        min_tokens: contexts shorter than this run dense, whatever the variant.
        run: tells this run's cached blocks from those of any other.
    """

    model: ServedModel
    tokenizer: Tokenizer
    corpus: Corpus
    seed: int
    min_tokens: int
    run: str

    def extras(self, variant: Variant, length_tokens: int) -> dict[str, Any]:
        """Sampling extras of a variant's requests, sparse even where it does not pay; none without the plugin."""
        if variant.name == DENSE:
            return dict(DENSE_EXTRAS) if self.model.is_sparse else {}
        return {
            "sparse_min_tokens": self.min_tokens,
            "sparse_unprofitable": "sparse",
            **variant.extras_at(length_tokens),
        }

    def salt(self, variant: Variant, *place: object) -> str:
        """Cached blocks of a variant's requests about a place are shared, and with no others."""
        return "-".join(["quality", self.run, variant.name, *(str(part) for part in place)])


def dense_and(variants: Sequence[Variant]) -> list[Variant]:
    """The variants, and dense before them."""
    return [Variant(DENSE), *variants]
