"""Parts of Triton kernels: reading keys of the paged cache, and finding the best scores of a row."""

from __future__ import annotations

import triton
import triton.language as tl

# That a program may have, by compute capability of NVIDIA's GPUs.
SHARED_MEMORY_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
AMD_SHARED_MEMORY_KIB = 64
# Of keys of an FP8 cache, in products: holds each of them exactly.
READABLE = tl.constexpr(tl.bfloat16)
LEAST_KEY = tl.constexpr(-(1 << 31))
# Entries of a row that a program holds in registers. More would need more than 16 warps; fewer than 4 warps gain
# nothing.
LEAST_ROW_TILE, LARGEST_ROW_TILE = 1024, 32768


def product_tile(count: int) -> int:
    """Rows, columns or channels of a tile that holds `count` of them: a power of two, as matrix products need 16."""
    tile: int = max(triton.next_power_of_2(count), 16)
    return tile


def is_amd() -> bool:
    """Whether kernels are compiled by AMD's compiler."""
    if triton.knobs.runtime.interpret:
        return False
    backend: str = triton.runtime.driver.active.get_current_target().backend
    return backend == "hip"


def register_limit(registers: int) -> dict[str, int]:
    """Options of a launch that leave each thread at most so many registers; AMD's compiler has no such option."""
    return {} if is_amd() else {"maxnreg": registers}


def shared_memory_kib() -> int:
    """Shared memory that a program may have on the current device, in KiB; the least that any has if it is unknown."""
    if triton.knobs.runtime.interpret:
        return max(SHARED_MEMORY_KIB.values())
    target = triton.runtime.driver.active.get_current_target()
    return AMD_SHARED_MEMORY_KIB if target.backend == "hip" else SHARED_MEMORY_KIB.get(target.arch, 99)


def float32_precision() -> str:
    """Of products of float32 numbers, as accurate as they are: three in TF32 on NVIDIA's tensor cores."""
    return "ieee" if is_amd() else "tf32x3"


@triton.jit
def readable(b_key):
    """Keys in numbers that products take: those of an FP8 cache in `READABLE`."""
    if b_key.dtype == tl.float8e4nv:
        b_key = b_key.to(READABLE)
    return b_key


@triton.jit
def load_keys(
    cache_pointer,
    block_table_pointer,
    o_key,
    live,
    i_kv_head,
    o_dim,
    in_head,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
):
    """Keys of one KV head at positions `o_key`, 0 where not `live`: ``[positions, channels]``."""
    physical = tl.load(block_table_pointer + o_key // CACHE_BLOCK, mask=live, other=0).to(tl.int64)
    p_key = cache_pointer + physical * cache_block_stride + i_kv_head * cache_head_stride
    p_key += (o_key % CACHE_BLOCK) * cache_token_stride
    return readable(tl.load(p_key[:, None] + o_dim[None, :], mask=live[:, None] & in_head[None, :], other=0.0))


@triton.jit
def load_key_block(
    cache_pointer,
    block_table_pointer,
    first_key,
    context,
    i_kv_head,
    o_dim,
    in_head,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Keys of `TOKENS` adjacent positions from `first_key` on, a multiple of `TOKENS`, as `load_keys` returns them.

    Reads the block table once if a cache block holds all of them. `WHOLE`: all positions are below `context` and all of
    `o_dim` in the head, so that nothing is masked.
    """
    o_offset = tl.arange(0, TOKENS)
    live = first_key + o_offset < context
    if CACHE_BLOCK % TOKENS == 0:
        physical = tl.load(block_table_pointer + first_key // CACHE_BLOCK).to(tl.int64)
        p_key = cache_pointer + physical * cache_block_stride + i_kv_head * cache_head_stride
        p_key += first_key % CACHE_BLOCK * cache_token_stride
        p_key = p_key + o_offset[:, None] * cache_token_stride + o_dim[None, :]
        if WHOLE:
            b_key = readable(tl.load(p_key))
        else:
            b_key = readable(tl.load(p_key, mask=live[:, None] & in_head[None, :], other=0.0))
    else:
        b_key = load_keys(
            cache_pointer,
            block_table_pointer,
            first_key + o_offset,
            live,
            i_kv_head,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
        )
    return b_key


@triton.jit
def ordered_scores(p_score, o_entry, competes):
    """Scores as int32 keys in the same order; the least integer for entries that do not compete."""
    b_score = tl.load(p_score + o_entry, mask=competes, other=0.0)
    # Adding zero turns a negative zero into a positive one: the two are equal and must tie.
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(competes, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), LEAST_KEY)


@triton.jit
def chosen_entries(b_key, b_equal, threshold, equal_left):
    """Which of a tile's entries a row keeps: those above its threshold, and the first of those that equal it.

    Args:
        b_key: keys of `ordered_scores`.
        b_equal: int32, 1 for entries that equal the threshold and may be kept, else 0.
        threshold: the row's threshold of `row_threshold`.
        equal_left: how many entries that equal the threshold the row still keeps.

    Returns:
        Whether each entry is kept, and `equal_left` for the next tile.
    """
    b_chosen = (b_key > threshold) | ((b_equal > 0) & (tl.cumsum(b_equal, axis=0) <= equal_left))
    return b_chosen, equal_left - tl.sum(b_equal)


@triton.jit
def equal_needed(threshold, above, target, entries):
    """How many entries that equal a row's threshold of masses reach `target` with those above it: int32, at least 1.

    Args:
        threshold: of `row_threshold` with `MASS`.
        above: sum of the entries above it.
        target: sum to reach.
        entries: of the row, all of which are needed where they do not reach `target`.
    """
    mass = tl.cast(threshold, tl.float32, bitcast=True)
    needed = tl.where(mass > 0, tl.ceil((target - above) / tl.maximum(mass, 1e-38)), entries)
    # Bounded before it is an integer: rounding of sums may leave much to tiny masses.
    return tl.maximum(tl.minimum(needed, entries), 1).to(tl.int32)


def threshold_tile(width: int) -> tuple[int, int]:
    """Entries of a row that `row_threshold` holds in registers, at most 64 per thread, and the number of warps."""
    entries = min(max(triton.next_power_of_2(width), LEAST_ROW_TILE), LARGEST_ROW_TILE)
    return entries, max(entries // (32 * 64), 4)


@triton.jit
def score_of(b_key):
    """The score of a key of `ordered_scores`."""
    return (b_key ^ ((b_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _counted(b_key, least, MASS: tl.constexpr, LOGARITHMS: tl.constexpr):
    """1 for each key that is `least` or more, or if `MASS` the key's mass; 0 for the others."""
    if LOGARITHMS:
        b_weight = tl.exp(score_of(b_key))
    elif MASS:
        # Keys of negative scores are no masses.
        least = tl.maximum(least, 0)
        b_weight = b_key.to(tl.float32, bitcast=True)
    else:
        b_weight = tl.full(b_key.shape, 1, tl.int32)
    return tl.where(b_key >= least, b_weight, 0)


@triton.jit
def row_threshold(
    p_score,
    first,
    stop,
    target,
    MASS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
    LOGARITHMS: tl.constexpr = False,
):
    """Largest threshold that at least `target` of the entries `first` to `stop - 1` of a row reach.

    If `MASS`, the sum of the scores that reach the threshold is at least `target` instead of their number, and negative
    scores count as nothing. If `LOGARITHMS` too, the scores are logarithms of what is summed, and may.

    The threshold is found from its highest bits to its lowest, two at a time. The row's first `ROW_TILE` entries stay
    in registers; the other entries of a longer row are read again for each two bits, from the GPU's caches.

    Returns:
        The threshold as an int32 key of `ordered_scores`, the least integer if all entries together do not reach
        `target`; and the number of entries above the threshold, or if `MASS` their sum.
    """
    o_row = tl.arange(0, ROW_TILE)
    b_row = ordered_scores(p_score, o_row, (o_row >= first) & (o_row < stop))
    threshold = tl.full([], LEAST_KEY, tl.int64)
    bit = tl.full([], 1 << 30, tl.int64)
    above = tl.full([], 0, tl.float32 if MASS else tl.int32)
    for _ in range(16):
        one, two, three = (
            (threshold + bit).to(tl.int32),
            (threshold + 2 * bit).to(tl.int32),
            (threshold + 3 * bit).to(tl.int32),
        )
        reach_one = tl.sum(_counted(b_row, one, MASS, LOGARITHMS))
        reach_two = tl.sum(_counted(b_row, two, MASS, LOGARITHMS))
        reach_three = tl.sum(_counted(b_row, three, MASS, LOGARITHMS))
        if stop > ROW_TILE:
            b_one = tl.full([TILE], 0, tl.float32 if MASS else tl.int32)
            b_two, b_three = b_one, b_one
            for start in range(ROW_TILE, stop, TILE):
                o_entry = start + tl.arange(0, TILE)
                b_key = ordered_scores(p_score, o_entry, (o_entry >= first) & (o_entry < stop))
                b_one += _counted(b_key, one, MASS, LOGARITHMS)
                b_two += _counted(b_key, two, MASS, LOGARITHMS)
                b_three += _counted(b_key, three, MASS, LOGARITHMS)
            reach_one += tl.sum(b_one)
            reach_two += tl.sum(b_two)
            reach_three += tl.sum(b_three)
        steps = (reach_one >= target).to(tl.int32) + (reach_two >= target) + (reach_three >= target)
        threshold += steps * bit
        # The bits after the last step that was too far are all ones. So the entries that reached that step are the
        # entries above the threshold.
        above = tl.where(
            steps == 0, reach_one, tl.where(steps == 1, reach_two, tl.where(steps == 2, reach_three, above))
        )
        bit = bit >> 2
    return threshold.to(tl.int32), above


@triton.jit
def largest_of_groups(b_product, PAGE: tl.constexpr, GROUPS: tl.constexpr):
    """The largest product of each group of keys that one thread holds, ``[rows, pages, GROUPS]``."""
    pages: tl.constexpr = b_product.shape[1] // PAGE
    b_key = tl.reshape(b_product, [b_product.shape[0], pages, PAGE // (2 * GROUPS), GROUPS, 2])
    return tl.max(tl.max(b_key, axis=4), axis=2)
