// The best units of decode rows as token lists: a radix select over a list's scores by the blocks of one cluster.
//
// The specification is `top_tokens` in vllm_sparse/kernels/top_tokens/reference.py. Each warp of a cluster owns
// adjacent units. The least score kept is found in four digits of eight bits, the highest first. Each digit comes
// from a histogram over the units that agree with the digits before. Then each warp counts what it keeps, and writes
// it after what the warps before it keep. Scores are read from the L2 cache each time. One block of the cluster
// processes a short list alone, because the blocks would wait for one another longer than they work.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cg = cooperative_groups;

namespace {

constexpr int kWarps = 32;
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kDigits = 32 / kDigitBits;
constexpr int kMostBlocks = 8;  // Clusters of more are not promised to be launched.
constexpr int kBlocksAtOnce = 2 * 132;  // Two on each multiprocessor.
// Most units of a list that one block selects from: if there are few lists, and if other lists' blocks fill the device.
constexpr int kUnitsOfOneBlock = 2048, kUnitsAmongLists = 8192;
constexpr unsigned kAll = 0xFFFFFFFFu;

struct Arguments {
  const float* scores;       // Unit u of list r, h: starts[r] + h * head_stride + u.
  const long long* starts;   // [rows]
  const int* contexts;       // [rows], 0 for rows that keep their lists
  const int* knobs;          // [rows, 3] budget, sink and recent tokens
  const int* block_table;    // [rows, blocks]
  int* slots;                // [rows * kv_heads, width]
  int* kept_tokens;          // [rows * kv_heads]
  long long head_stride, knob_stride, table_stride, width;
  int kv_heads, unit, block_size;
};

// A score as an unsigned integer of the same order. Adding zero turns -0 into +0: the two are equal and must tie.
__device__ __forceinline__ unsigned ordered(float score) {
  const unsigned bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ int warp_inclusive_sum(int value, int lane) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kAll, value, offset);
    if (lane >= offset) value += before;
  }
  return value;
}

__global__ void __launch_bounds__(kWarps * 32) top_tokens(const __grid_constant__ Arguments a) {
  // A copy of the histogram for each lane, so that lanes of a warp never add to one number or in one bank.
  __shared__ int lane_counts[kBins][32];
  // Two, so that a block may write the next one while others still read the last one.
  __shared__ int block_counts[2][kBins];
  __shared__ int warp_sums[kBins / 32];
  __shared__ int chosen_bin, chosen_above;
  __shared__ int2 warp_kept[kWarps];  // Number of units above the threshold or forced, and of units equal to it.
  __shared__ int2 block_kept;

  const int list = blockIdx.y, row = list / a.kv_heads, head = list % a.kv_heads;
  const int context = a.contexts[row];
  if (context == 0) return;
  cg::cluster_group cluster = cg::this_cluster();
  const int unit = a.unit, units = (context + unit - 1) / unit;
  const int rank = cluster.block_rank(), most_blocks = cluster.num_blocks();
  const int blocks = units <= (most_blocks == kMostBlocks ? kUnitsOfOneBlock : kUnitsAmongLists) ? 1 : most_blocks;
  if (rank >= blocks) return;
  const auto wait_for_all = [&] {
    if (blocks > 1) {
      cluster.sync();
    } else {
      __syncthreads();
    }
  };
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  const int* knobs = a.knobs + row * a.knob_stride;
  const int sink_units = min((knobs[1] + unit - 1) / unit, units);
  const int first_recent = max(max(context - max(knobs[2], 1), 0) / unit, sink_units);
  const int forced = sink_units + units - first_recent;
  const int kept_units = min(max((knobs[0] + unit - 1) / unit, forced), units);
  const float* scores = a.scores + a.starts[row] + head * a.head_stride;

  const int groups = (units + 31) / 32, all_warps = blocks * kWarps;
  const int warp_units = (groups + all_warps - 1) / all_warps * 32;
  const int first = min((rank * kWarps + warp) * warp_units, units), last = min(first + warp_units, units);
  const int first_competing = max(first, sink_units), last_competing = min(last, first_recent);

  // The threshold's digits so far, and how many of the units that agree with them are kept. Where no unit is wanted,
  // each digit is the largest possible, and no score is above the threshold.
  unsigned threshold = 0;
  int remaining = kept_units - forced;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = 32 - kDigitBits * (digit + 1);
    for (int index = thread; index < kBins * 32; index += kWarps * 32) (&lane_counts[0][0])[index] = 0;
    __syncthreads();
#pragma unroll 8
    for (int at = first_competing + lane; at < last_competing; at += 32) {
      const unsigned key = ordered(scores[at]);
      // The digits before are those above this one; a shift by all 32 bits is undefined.
      const bool agrees = digit == 0 || (key ^ threshold) >> (shift + kDigitBits) == 0;
      if (agrees) atomicAdd(&lane_counts[key >> shift & (kBins - 1)][lane], 1);
    }
    __syncthreads();
    int* counts = block_counts[digit % 2];
    if (thread < kBins) {
      int count = 0;
#pragma unroll
      for (int copy = 0; copy < 32; ++copy) count += lane_counts[thread][(copy + thread) % 32];
      counts[thread] = count;
    }
    wait_for_all();
    // How many units reach each bin, from the largest bin down.
    int count = 0, reaching = 0;
    const int bin = kBins - 1 - thread;
    if (thread < kBins) {
      for (int other = 0; other < blocks; ++other) count += cluster.map_shared_rank(counts, other)[bin];
      reaching = warp_inclusive_sum(count, lane);
      if (lane == 31) warp_sums[warp] = reaching;
    }
    __syncthreads();
    if (thread < kBins) {
      for (int before = 0; before < warp; ++before) reaching += warp_sums[before];
      if (reaching >= remaining && (reaching - count < remaining || thread == 0)) {
        chosen_bin = bin;
        chosen_above = reaching - count;
      }
    }
    __syncthreads();
    threshold |= static_cast<unsigned>(chosen_bin) << shift;
    remaining -= chosen_above;
  }

  int above = 0, equal = 0;
#pragma unroll 4
  for (int at = first + lane; at < last; at += 32) {
    const bool competes = at >= sink_units && at < first_recent;
    const unsigned key = competes ? ordered(scores[at]) : 0;
    above += !competes || key > threshold;
    equal += competes && key == threshold;
  }
  above = warp_inclusive_sum(above, lane);
  equal = warp_inclusive_sum(equal, lane);
  if (lane == 31) warp_kept[warp] = make_int2(above, equal);
  __syncthreads();
  if (warp == 0) {
    const int2 own = warp_kept[lane];
    const int through_above = warp_inclusive_sum(own.x, lane), through_equal = warp_inclusive_sum(own.y, lane);
    warp_kept[lane] = make_int2(through_above - own.x, through_equal - own.y);
    if (lane == 31) block_kept = make_int2(through_above, through_equal);
  }
  wait_for_all();
  int above_before = warp_kept[warp].x, equal_before = warp_kept[warp].y;
  for (int other = 0; other < rank; ++other) {
    const int2 kept = *cluster.map_shared_rank(&block_kept, other);
    above_before += kept.x;
    equal_before += kept.y;
  }
  // No block may end while others read its shared memory.
  wait_for_all();

  int written = above_before + min(equal_before, remaining);
  const int* table = a.block_table + row * a.table_stride;
  int* slots = a.slots + list * a.width;
  const unsigned lanes_before = (1u << lane) - 1;
  for (int group = first; group < last; group += 32) {
    const int at = group + lane;
    const bool exists = at < last, competes = exists && at >= sink_units && at < first_recent;
    const unsigned key = competes ? ordered(scores[at]) : 0;
    const bool ties = competes && key == threshold;
    const unsigned tying = __ballot_sync(kAll, ties);
    const bool keeps = (exists && !competes) || (competes && key > threshold) ||
                       (ties && equal_before + __popc(tying & lanes_before) < remaining);
    const unsigned keeping = __ballot_sync(kAll, keeps);
    if (keeps) {
      int* to = slots + static_cast<long long>(written + __popc(keeping & lanes_before)) * unit;
      const int position = at * unit;
      for (int token = 0; token < min(unit, context - position); ++token) {
        const int block = table[(position + token) / a.block_size];
        to[token] = (block * a.kv_heads + head) * a.block_size + (position + token) % a.block_size;
      }
    }
    written += __popc(keeping);
    equal_before += __popc(tying);
  }
  if (rank == 0 && thread == 0) a.kept_tokens[list] = (kept_units - 1) * unit + (context - 1) % unit + 1;
}

}  // namespace

// Returns a CUDA error code. Strides count numbers.
extern "C" int vllm_sparse_top_tokens(const void* scores, const void* starts, const void* contexts, const void* knobs,
                                      const void* block_table, void* slots, void* kept_tokens, long long head_stride,
                                      long long knob_stride, long long table_stride, long long width, int rows,
                                      int kv_heads, int unit, int block_size, void* stream) {
  Arguments a{static_cast<const float*>(scores),
              static_cast<const long long*>(starts),
              static_cast<const int*>(contexts),
              static_cast<const int*>(knobs),
              static_cast<const int*>(block_table),
              static_cast<int*>(slots),
              static_cast<int*>(kept_tokens),
              head_stride,
              knob_stride,
              table_stride,
              width,
              kv_heads,
              unit,
              block_size};
  const int lists = rows * kv_heads;
  int blocks = kMostBlocks;
  while (blocks > 1 && lists * blocks > kBlocksAtOnce) blocks /= 2;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks, lists);
  config.blockDim = dim3(kWarps * 32);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, top_tokens, a);
}
