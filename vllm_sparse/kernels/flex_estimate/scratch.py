"""Memory that FlexPrefill's sample takes between its launches on a GPU."""

from __future__ import annotations

from vllm_sparse.kernels.flex_estimate.samples import Samples
from vllm_sparse.step.chunks import held_at_once, parts_within

# Sums of a stretch are kept until their normalisers are known; if this is short, stretches take several launches.
SCRATCH_BYTES = 1 << 28
# Of a sampled query and key block: a maximum and two sums in float32.
SUMS_BYTES = 12


def key_block_bytes(heads: int, key_block_tokens: int) -> int:
    """Memory that the sums of one key block take."""
    return SUMS_BYTES * heads * key_block_tokens


def scratch_bytes(stretches: int, key_blocks: int, heads: int, key_block_tokens: int) -> int:
    """Memory that `flex_estimate` takes beside its result.

    Args:
        stretches: of prompt chunks.
        key_blocks: of the longest context.
        heads: query heads of this process.
        key_block_tokens: tokens of a key block.
    """
    return held_at_once(stretches, key_blocks * key_block_bytes(heads, key_block_tokens), SCRATCH_BYTES)


def parts(samples: Samples, heads: int) -> list[range]:
    """Stretches that are estimated together, as many as the memory allows: ascending ranges that cover all.

    Args:
        samples: of all stretches.
        heads: query heads.
    """
    return parts_within(samples.starts, SCRATCH_BYTES // key_block_bytes(heads, samples.key_block_tokens))
