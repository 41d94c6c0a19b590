"""FlexPrefill's sample in PyTorch: the specification, on any device.

The attention of the last `rows` queries of a prompt chunk is summed per key block while the keys are read in tiles,
then per distance band, so that no ``[heads, rows, context]`` buffer exists (FlexPrefill, arXiv 2502.20766, section 3.2;
the sums by tiles are this project's).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vllm_sparse.kernels.flex_estimate.samples import Samples
from vllm_sparse.keys import PagedKeys
from vllm_sparse.step.chunks import PromptChunks

# A multiple of every block size. So small that on a CPU the scores of a tile stay in its cache.
TILE_TOKENS = 1024


@dataclass(frozen=True)
class FlexEstimate:
    """Mean attention of the sampled rows, per query head and stretch of a prompt chunk.

    Attributes:
        line_mass: float32 ``[2, heads, stretches, key_blocks]`` mass per key block, then per band of distances
            ``query - key`` in ``[band * block, (band + 1) * block)``; every row sums to 1. 0 past a context.
        key_block_mean: float32 ``[kv_heads, chunks, key_blocks, head_size]`` mean key of each block's live tokens,
            anything past a context.
    """

    line_mass: torch.Tensor
    key_block_mean: torch.Tensor

    @property
    def column_mass(self) -> torch.Tensor:
        """float32 ``[heads, stretches, key_blocks]`` mass per key block."""
        return self.line_mass[0]

    @property
    def band_mass(self) -> torch.Tensor:
        """float32 ``[heads, stretches, key_blocks]`` mass per distance band."""
        return self.line_mass[1]


@dataclass(frozen=True)
class TokenProfiles:
    """Token-level profiles of the sampled rows, as the official code takes its line counts from them.

    Attributes:
        column: float32 ``[heads, context]`` mean mass of each key position.
        distance: float32 ``[heads, context]`` mean mass of each distance ``query - key``.
    """

    column: torch.Tensor
    distance: torch.Tensor


def _score_tiles(
    sample: torch.Tensor, keys: PagedKeys, scale: float
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield ``(start, keys [kv_heads, n, head_size], scores [kv_heads, group, rows, n])`` per key tile, causal."""
    rows, heads, head_size = sample.shape
    num_kv_heads = keys.num_kv_heads
    first_position = keys.seq_len - rows
    # [kv_heads, group * rows, head_size]: all query heads of a group share one pass over the keys.
    grouped = (sample.permute(1, 0, 2).float() * scale).reshape(num_kv_heads, -1, head_size)
    positions = torch.arange(first_position, keys.seq_len, device=sample.device)
    for start in range(0, keys.seq_len, TILE_TOKENS):
        stop = min(start + TILE_TOKENS, keys.seq_len)
        tile = keys.read(start, stop)
        scores = torch.bmm(grouped, tile.float().transpose(1, 2)).view(
            num_kv_heads, heads // num_kv_heads, rows, stop - start
        )
        if stop > first_position:
            future = torch.arange(start, stop, device=sample.device) > positions.unsqueeze(1)
            scores = scores.masked_fill_(future, float("-inf"))
        yield start, tile, scores


@dataclass(frozen=True)
class BlockMasses:
    """Unnormalised attention of the sampled rows per key block, each block relative to its own maximum.

    Attributes:
        maximum: float32 ``[heads, rows, blocks]`` largest score; 0 where all of a block is in the row's future.
        total: float32, the shape of `maximum`: sum of ``exp(score - maximum)`` over the block's keys in reach.
        nearer: float32, the shape of `maximum`: the same sum over those keys whose offset in the block is at most the
            query's, which lie in the nearer of the two distance bands that the block touches.
        key_mean: float32 ``[kv_heads, blocks, head_size]``.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    nearer: torch.Tensor
    key_mean: torch.Tensor


def block_masses(sample: torch.Tensor, keys: PagedKeys, scale: float, block_size_tokens: int) -> BlockMasses:
    """Sums of the sampled rows' attention over each key block.

    Args:
        sample: ``[rows, query_heads, head_size]`` last queries of the prompt chunk, at the last `rows` positions.
        keys: the request's keys, those of the prompt chunk included.
        scale: softmax scale.
        block_size_tokens: tokens of a selection block; divides `TILE_TOKENS`.
    """
    rows, heads, _ = sample.shape
    block = block_size_tokens
    device = sample.device
    positions = torch.arange(keys.seq_len - rows, keys.seq_len, device=device)
    nearer_mask = (torch.arange(block, device=device) <= (positions % block).unsqueeze(1)).float()
    maxima, totals, nearer, means = [], [], [], []
    for _, tile, scores in _score_tiles(sample, keys, scale):
        live = scores.shape[-1]
        blocks = -(-live // block)
        if live % block:
            scores = torch.nn.functional.pad(scores, (0, blocks * block - live), value=float("-inf"))
        scores = scores.view(heads, rows, blocks, block)
        maximum = scores.amax(dim=-1)
        maximum = torch.where(maximum.isinf(), torch.zeros_like(maximum), maximum)
        mass = scores.sub_(maximum.unsqueeze(-1)).exp_()
        maxima.append(maximum)
        totals.append(mass.sum(-1))
        nearer.append(mass.mul_(nearer_mask.unsqueeze(1)).sum(-1))
        means.append(_block_means(tile, block))
    return BlockMasses(
        torch.cat(maxima, dim=-1), torch.cat(totals, dim=-1), torch.cat(nearer, dim=-1), torch.cat(means, dim=1)
    )


def combine(masses: BlockMasses, seq_len: int, block_size_tokens: int) -> torch.Tensor:
    """Normalise block masses and sum them over the rows, by key block and by band: float32 ``[2, heads, blocks]``."""
    heads, rows, blocks = masses.total.shape
    block = block_size_tokens
    first_position = seq_len - rows
    reachable = masses.total > 0
    maximum = masses.maximum.masked_fill(~reachable, float("-inf")).amax(dim=-1, keepdim=True)
    # The row's maximum is at least every block's, so rescaling never overflows.
    factor = torch.where(reachable, masses.maximum - maximum, float("-inf")).exp()
    total, near = masses.total * factor, masses.nearer * factor
    denominator = total.sum(-1, keepdim=True) * rows
    total, near = total / denominator, near / denominator
    far = total - near
    line_mass = torch.zeros(2, heads, blocks, dtype=torch.float32, device=total.device)
    column_mass, band_mass = line_mass
    column_mass.copy_(total.sum(1))
    for query_block in range(first_position // block, (seq_len - 1) // block + 1):
        begin = max(query_block * block - first_position, 0)
        end = min((query_block + 1) * block - first_position, rows)
        # Key block J lies in bands query_block - J (nearer part) and query_block - J - 1 (farther part).
        band_mass[:, : query_block + 1] += near[:, begin:end, : query_block + 1].sum(1).flip(1)
        band_mass[:, :query_block] += far[:, begin:end, :query_block].sum(1).flip(1)
    return line_mass


def flex_estimate(chunks: PromptChunks, samples: Samples) -> FlexEstimate:
    """The estimate of prompt chunks, one stretch after another; arguments as in the public function."""
    heads, head_size = chunks.query.shape[1:]
    spans, key_blocks = samples.queries.spans, samples.key_blocks
    line_mass = torch.zeros(2, heads, len(spans), key_blocks, device=chunks.query.device)
    shape = chunks.keys[0].num_kv_heads, len(chunks.keys), key_blocks, head_size
    key_block_mean = torch.zeros(shape, device=chunks.query.device)
    sampled = replace(chunks, blocks=samples.queries)
    for chunk, keys in enumerate(chunks.keys):
        for stretch in range(*samples.of_chunks.starts[chunk : chunk + 2]):
            blocks, seq_len = samples.key_blocks_of(stretch), spans[stretch].seq_len
            reached = keys.until(seq_len)
            masses = block_masses(sampled.query_of(stretch), reached, chunks.scale, samples.key_block_tokens)
            line_mass[:, :, stretch, :blocks] = combine(masses, seq_len, samples.key_block_tokens)
            # The last stretch reaches all of the chunk's context.
            key_block_mean[:, chunk, :blocks] = masses.key_mean
    return FlexEstimate(line_mass, key_block_mean)


def token_profiles(sample: torch.Tensor, keys: PagedKeys, scale: float) -> TokenProfiles:
    """Token-level column and distance profiles, in two passes over the keys; arguments as in `block_masses`."""
    rows, heads, _ = sample.shape
    context = keys.seq_len
    log_sums = [torch.logsumexp(scores, dim=-1) for _, _, scores in _score_tiles(sample, keys, scale)]
    log_sum = torch.logsumexp(torch.stack(log_sums), dim=0).unsqueeze(-1)
    column = torch.empty(heads, context, dtype=torch.float32, device=sample.device)
    distance = torch.zeros(heads, context + rows, dtype=torch.float32, device=sample.device)
    for start, _, scores in _score_tiles(sample, keys, scale):
        mass = (scores - log_sum).exp().flatten(0, 1) / rows
        live = mass.shape[-1]
        column[:, start : start + live] = mass.sum(1)
        # Shear: padding each row by `rows` and reading rows of one element less puts key j of row i in column
        # j + rows - 1 - i, so that equal distances share a column.
        flipped = torch.nn.functional.pad(mass.flip(1), (0, rows))
        sheared = flipped.flatten(1)[:, : rows * (live + rows - 1)].view(heads, rows, live + rows - 1)
        # Column c holds distance context - 1 - start - c.
        sums = sheared.sum(1).flip(1)
        first_distance = context - 1 - start - (live + rows - 2)
        skip = max(-first_distance, 0)
        distance[:, first_distance + skip : first_distance + live + rows - 1] += sums[:, skip:]
    return TokenProfiles(column, distance[:, :context])


def _block_means(tile: torch.Tensor, block: int) -> torch.Tensor:
    """Mean over the live tokens of each block: float32 ``[kv_heads, ceil(n / block), head_size]``."""
    kv_heads, live, head_size = tile.shape
    blocks = -(-live // block)
    padded = torch.nn.functional.pad(tile.float(), (0, 0, 0, blocks * block - live))
    sums = padded.view(kv_heads, blocks, block, head_size).sum(2)
    counts = torch.full((blocks, 1), float(block), device=tile.device)
    counts[-1] = live - (blocks - 1) * block
    return sums / counts
