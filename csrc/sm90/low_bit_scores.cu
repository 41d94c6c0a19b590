// SALE's scores on Hopper: which pages hold a key that scores enough in some row of a query block.
//
// The specification is vllm_sparse/kernels/low_bit_scores/reference.py (SALE, arXiv 2505.24179, sections 3.1 and 3.2).
// A thread block has four warpgroups of 64 rows each, which share a stream of keys that one more warp fetches. A
// warpgroup compares half a tile of keys while it multiplies the next half. Of the 8 columns of an integer product, a
// thread holds the two of one scale group. So the largest integer of a page's group never leaves the registers of the
// thread, and only bits, one per page, are exchanged between rows.
//
// Tables say which prompt chunk the 256 rows of a thread block belong to, where that chunk's queries lie in the step and
// where its pages among the quantised ones of all chunks.
//
// On an H200, 131072 keys, 32 heads, 8192 rows: SALE's whole selection takes 6.8 ms with it, where the scores of the
// Triton twin alone take 13.6 ms (command: python -m loadtest.benchmarks.kernels.prefill; tables: loadtest/RESULTS.md).

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "quantised_pages.cuh"

namespace {

using namespace vllm_sparse;

constexpr int kWarpgroups = 4;
constexpr int kRows = 64;  // Rows of a warpgroup.
constexpr int kScoringThreads = kWarpgroups * 128;
constexpr int kThreads = kScoringThreads + 128;  // One more warpgroup, of which one thread fetches.
constexpr int kTilePages = 4;
constexpr int kTileBytes = kTilePages * kPageBytes;
constexpr int kTilesPerBatch = kBatchPages / kTilePages;
constexpr int kStages = 6;
constexpr int kBatchStages = 2;
constexpr int kHalfPages = kTilePages / 2;
constexpr uint32_t kFirstPages = 0x11111111;  // The first page of each tile of a batch.
static_assert(kTilePages == 4 && kBatchPages == 32);
constexpr int kSegmentPages = 1024;

struct alignas(1024) Shared {
  uint8_t levels[kStages][kTileBytes];
  uint8_t query[kWarpgroups][2][kRows * 128];
  uint8_t means[kBatchStages][kMeanBytes];
  float numbers[kBatchStages][kBatchPages][kPageNumbers];
  // Per warp, page and pair of rows (r, r + 8): what the best integer times its scale must exceed.
  float2 needed[kScoringThreads / 32][kBatchPages][8];
  float least[kWarpgroups * kRows];
  float worth[kWarpgroups * kRows];
  float norm[kWarpgroups * kRows];
  float error[kWarpgroups * kRows];
  uint32_t bits[kWarpgroups][4][4];
  uint64_t levels_full[kStages], levels_empty[kStages];
  uint64_t batch_full[kBatchStages], batch_empty[kBatchStages];
};

struct Arguments {
  const void* query;             // [step tokens, heads, 128]
  const int8_t* query_levels;    // [heads, step tokens, 128]
  const float* row_numbers;      // [4, heads, step tokens]: least, scale, norm, error
  const int8_t* key_levels;      // [kv_heads, padded_pages, 32, 128], 16-byte pieces swizzled
  const void* means;             // [kv_heads, padded_pages / 32, 2, 32, 64], likewise
  const float* page_numbers;     // [kv_heads, padded_pages, 8]
  uint8_t* kept;                 // [heads, blocks, query_block / 64, key_pages]
  const int* tile_chunk;         // [tiles] prompt chunk of the rows of a thread block
  const int* tile_row;           // [tiles] its first row in the chunk
  const int* chunk_start;        // [chunks + 1] first query block of each chunk
  const int* first_query;        // [blocks] position in its context of each query block's first query
  const int* first_token;        // [blocks] its place in the step
  const int* context;            // [chunks] tokens in each cache
  const int* page_start;         // [chunks + 1] first page of each chunk among the quantised ones of all
  const int* pages;              // [chunks] pages of each chunk that are quantised
  long long query_row_stride, query_head_stride;
  int step_tokens, blocks, first_page, padded_pages, key_pages, sink_pages, local_tokens, query_block, heads, group;
  int page_bounds;
  float scale;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Rows of 128 bytes in the 128-byte swizzle, eight of them in each 1024 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}

__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Wait until the results of products in flight may be read.
template <typename Number, int kCount>
__device__ __forceinline__ void settle(Number (&sum)[kCount]) {
#pragma unroll
  for (int index = 0; index < kCount; ++index) {
    if constexpr (std::is_integral_v<Number>) {
      asm volatile("" : "+r"(sum[index])::"memory");
    } else {
      asm volatile("" : "+f"(sum[index])::"memory");
    }
  }
}

// sum += left (64 x 32, in registers) times 64 keys of 32 channels.
__device__ __forceinline__ void multiply_levels(int32_t (&sum)[32], const uint32_t (&left)[4], uint64_t keys,
                                                int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p;\n"
      "}\n"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3]), "+r"(sum[4]), "+r"(sum[5]), "+r"(sum[6]),
        "+r"(sum[7]), "+r"(sum[8]), "+r"(sum[9]), "+r"(sum[10]), "+r"(sum[11]), "+r"(sum[12]), "+r"(sum[13]),
        "+r"(sum[14]), "+r"(sum[15]), "+r"(sum[16]), "+r"(sum[17]), "+r"(sum[18]), "+r"(sum[19]), "+r"(sum[20]),
        "+r"(sum[21]), "+r"(sum[22]), "+r"(sum[23]), "+r"(sum[24]), "+r"(sum[25]), "+r"(sum[26]), "+r"(sum[27]),
        "+r"(sum[28]), "+r"(sum[29]), "+r"(sum[30]), "+r"(sum[31])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(keys), "r"(accumulate));
}

// sum += left (64 x 16) times 32 mean keys of 16 channels.
#define VLLM_SPARSE_MULTIPLY_MEANS(TYPE)                                                                        \
  asm volatile(                                                                                                 \
      "{\n"                                                                                                     \
      ".reg .pred p;\n"                                                                                         \
      "setp.ne.b32 p, %18, 0;\n"                                                                                \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n"     \
      "}\n"                                                                                                     \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]),       \
        "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), "+f"(sum[12]), "+f"(sum[13]),   \
        "+f"(sum[14]), "+f"(sum[15])                                                                            \
      : "l"(left), "l"(keys), "r"(accumulate))

template <typename Number>
__device__ __forceinline__ void multiply_means(float (&sum)[16], uint64_t left, uint64_t keys, int accumulate);

template <>
__device__ __forceinline__ void multiply_means<__nv_bfloat16>(float (&sum)[16], uint64_t left, uint64_t keys,
                                                              int accumulate) {
  VLLM_SPARSE_MULTIPLY_MEANS("bf16");
}

template <>
__device__ __forceinline__ void multiply_means<__half>(float (&sum)[16], uint64_t left, uint64_t keys,
                                                       int accumulate) {
  VLLM_SPARSE_MULTIPLY_MEANS("f16");
}

// Bits that are set in any thread of a warpgroup. A slot may be used again after another slot has been used.
__device__ __forceinline__ uint32_t any_thread(Shared& shared, int warpgroup, int slot, uint32_t bits) {
  bits = __reduce_or_sync(0xFFFFFFFFu, bits);
  const int warp = threadIdx.x / 32 % 4;
  if (threadIdx.x % 32 == 0) shared.bits[warpgroup][slot][warp] = bits;
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
  const uint32_t* parts = shared.bits[warpgroup][slot];
  return parts[0] | parts[1] | parts[2] | parts[3];
}

// Bits of the pages of a batch from `from` on.
__device__ __forceinline__ uint32_t pages_from(int first_page, int from) {
  const int skipped = from - first_page;
  return skipped <= 0 ? 0xFFFFFFFFu : skipped >= kBatchPages ? 0u : 0xFFFFFFFFu << skipped;
}

// First page of the local window of a row of a prompt chunk, which has `rows` rows at the end of `context`.
__device__ __forceinline__ int local_start(const Arguments& a, int rows, int context, int row) {
  const int first = context - rows + row / a.query_block * a.query_block;
  const int end = min(first + a.query_block, context);
  return min(max(end - a.local_tokens, 0), first) / kPageTokens;
}

template <typename Number>
__global__ void __launch_bounds__(kThreads, 1) low_bit_scores(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) uint8_t raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);

  const int chunk = a.tile_chunk[blockIdx.x];
  const int first_row = a.tile_row[blockIdx.x];
  const int first_block = a.chunk_start[chunk];
  const int context = a.context[chunk];
  const int rows = context - a.first_query[first_block];
  const int first_token = a.first_token[first_block] + first_row;
  const int key_pages = (context + kPageTokens - 1) / kPageTokens;
  const int segment = blockIdx.y * kSegmentPages;
  if (segment >= key_pages) return;
  const int head = blockIdx.z;
  const int kv_head = head / a.group;
  const int warpgroup = threadIdx.x / 128;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  // Pages from `end` on are in the local window of all rows here: the last rows have the last local window.
  // No page of a chunk without quantised ones is scored.
  const int last_row = min(first_row + kWarpgroups * kRows, rows) - 1;
  const int end = min(min(segment + kSegmentPages, a.pages[chunk]), local_start(a, rows, context, last_row));
  const int batches = max(end - segment + kBatchPages - 1, 0) / kBatchPages;

  const long long stored =
      static_cast<long long>(kv_head) * a.padded_pages + a.page_start[chunk] - a.first_page + segment;
  const int8_t* levels = a.key_levels + stored * kPageBytes;
  const Number* means = static_cast<const Number*>(a.means) + stored * kHeadSize;
  const float* numbers = a.page_numbers + stored * kPageNumbers;

  auto fetch_tile = [&](int tile) {
    const int stage = tile % kStages;
    wait(&shared.levels_empty[stage], tile / kStages % 2 ^ 1);
    expect_bytes(&shared.levels_full[stage], kTileBytes);
    bulk_copy(shared.levels[stage], levels + static_cast<long long>(tile) * kTileBytes, kTileBytes,
              &shared.levels_full[stage]);
  };
  auto fetch_batch = [&](int batch) {
    const int stage = batch % kBatchStages;
    wait(&shared.batch_empty[stage], batch / kBatchStages % 2 ^ 1);
    expect_bytes(&shared.batch_full[stage], kMeanBytes + static_cast<int>(sizeof(shared.numbers[0])));
    bulk_copy(shared.means[stage], means + static_cast<long long>(batch) * kBatchPages * kHeadSize, kMeanBytes,
              &shared.batch_full[stage]);
    bulk_copy(shared.numbers[stage], numbers + batch * kBatchPages * kPageNumbers, sizeof(shared.numbers[0]),
              &shared.batch_full[stage]);
  };

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(&shared.levels_full[stage], 1);
      init_barrier(&shared.levels_empty[stage], kScoringThreads / 32);
    }
    for (int stage = 0; stage < kBatchStages; ++stage) {
      init_barrier(&shared.batch_full[stage], 1);
      init_barrier(&shared.batch_empty[stage], kScoringThreads / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // Queries for the products with the means, swizzled; rows past the prompt chunk are zeros, for which no page is kept.
  const Number* query = static_cast<const Number*>(a.query) + head * a.query_head_stride;
  for (int piece = threadIdx.x; piece < kWarpgroups * kRows * 16; piece += kThreads) {
    const int row = piece / 16, part = piece % 16;
    uint4 values = {0, 0, 0, 0};
    if (first_row + row < rows) {
      values = *reinterpret_cast<const uint4*>(query + (first_token + row) * a.query_row_stride + part * 8);
    }
    const int in_group = row % kRows;
    uint8_t* to = shared.query[row / kRows][part / 8] + swizzled(in_group, part % 8 * 16);
    *reinterpret_cast<uint4*>(to) = values;
  }
  const long long all_numbers = static_cast<long long>(a.heads) * a.step_tokens;
  for (int row = threadIdx.x; row < kWarpgroups * kRows; row += kThreads) {
    const bool live = first_row + row < rows;
    const float* from = a.row_numbers + static_cast<long long>(head) * a.step_tokens + first_token + row;
    shared.least[row] = live ? from[0] : __int_as_float(0x7F800000);
    shared.worth[row] = live ? 1.0f / (from[all_numbers] * a.scale) : 1.0f;
    shared.norm[row] = live ? from[2 * all_numbers] * a.scale : 0.0f;
    shared.error[row] = live ? from[3 * all_numbers] * a.scale : 0.0f;
  }

  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  if (warp >= kScoringThreads / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == kScoringThreads) {
      for (int batch = 0; batch < batches; ++batch) {
        fetch_batch(batch);
        for (int in_batch = 0; in_batch < kTilesPerBatch; ++in_batch) fetch_tile(batch * kTilesPerBatch + in_batch);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");

  // This thread's rows and its part of their levels: rows r and r + 8 of the warp's 16.
  const int row = warp * 16 + lane / 4;
  uint32_t left[4][4];
  for (int step = 0; step < 4; ++step) {
    for (int part = 0; part < 4; ++part) {
      const int of_tile = row + part % 2 * 8;
      const int8_t* from =
          a.query_levels + (static_cast<long long>(head) * a.step_tokens + first_token + of_tile) * kHeadSize;
      from += step * 32 + part / 2 * 16 + lane % 4 * 4;
      left[step][part] = first_row + of_tile < rows ? *reinterpret_cast<const uint32_t*>(from) : 0u;
    }
  }

  const int first_own = first_row + warpgroup * kRows;
  const bool idle = first_own >= rows;
  const int start_of_near = local_start(a, rows, context, min(first_own, rows - 1));
  const int parts = a.query_block / kRows;
  uint8_t* kept = a.kept + ((static_cast<long long>(head) * a.blocks + first_block) * parts + first_own / kRows) *
                               a.key_pages;
  const uint32_t query_address = shared_address(shared.query[warpgroup][0]);
  int32_t first_half[kHalfPages * 16] = {}, second_half[kHalfPages * 16] = {};
  const auto multiply = [&](int32_t(&sum)[kHalfPages * 16], uint64_t keys) {
    fence_products();
#pragma unroll
    for (int step = 0; step < 4; ++step) multiply_levels(sum, left[step], keys + step * 2, step);
    commit_products();
  };

  int stage = 0;
  uint32_t parity = 0;
  for (int batch = 0; batch < batches; ++batch) {
    const int batch_stage = batch % kBatchStages;
    const int first_page = segment + batch * kBatchPages;
    const float(*page_numbers)[kPageNumbers] = shared.numbers[batch_stage];
    wait(&shared.batch_full[batch_stage], batch / kBatchStages % 2);

    float mean_score[16];
    const uint32_t mean_address = shared_address(shared.means[batch_stage]);
    fence_products();
    for (int step = 0; step < 8; ++step) {
      const uint32_t within = step % 4 * 32;
      multiply_means<Number>(mean_score, descriptor(query_address + step / 4 * kRows * 128 + within),
                             descriptor(mean_address + step / 4 * kBatchPages * 128 + within), step);
    }
    commit_products();
    wait_products<0>();
    settle(mean_score);

    uint32_t passing_mean = 0, open = 0;
    const float least[2] = {shared.least[row], shared.least[row + 8]};
    const float worth[2] = {shared.worth[row], shared.worth[row + 8]};
    const float norm[2] = {shared.norm[row], shared.norm[row + 8]};
    const float error[2] = {shared.error[row], shared.error[row + 8]};
#pragma unroll
    for (int column = 0; column < 8; ++column) {
      const int page = column / 2 * 8 + lane % 4 * 2 + column % 2;
      const float radius = page_numbers[page][kRadius], page_error = page_numbers[page][kError];
      float needed[2];
#pragma unroll
      for (int of_pair = 0; of_pair < 2; ++of_pair) {
        // The mean's score less the row's threshold.
        const float above =
            mean_score[column / 2 * 4 + of_pair * 2 + column % 2] * a.scale - least[of_pair];
        passing_mean |= static_cast<uint32_t>(above > 0.0f) << page;
        open |= static_cast<uint32_t>(above + norm[of_pair] * radius > 0.0f) << page;
        // Add the most that rounding may have lowered the score; the rest must come from the best integer.
        needed[of_pair] =
            -(above + norm[of_pair] * page_error + error[of_pair] * (radius + page_error)) * worth[of_pair];
      }
      shared.needed[warp][page][lane / 4] = make_float2(needed[0], needed[1]);
    }
    __syncwarp();
    const uint32_t near = ~pages_from(first_page, a.sink_pages) | pages_from(first_page, start_of_near);
    uint32_t decided = near, scored = idle ? 0u : ~near;
    if (a.page_bounds) {
      decided |= any_thread(shared, warpgroup, 0, passing_mean);
      scored &= any_thread(shared, warpgroup, 1, open) & ~decided;
    }

    // Pages of a half, from page `from` of the batch on, that this thread's rows reach.
    const auto passing_pages = [&](const int32_t(&sum)[kHalfPages * 16], int from) {
      uint32_t pages = 0;
#pragma unroll
      for (int of_half = 0; of_half < kHalfPages; ++of_half) {
        int best[2];
#pragma unroll
        for (int of_pair = 0; of_pair < 2; ++of_pair) {
          const int32_t* found = sum + of_half * 16 + of_pair * 2;
          const int left_best = __vimax3_s32(__vimax3_s32(found[0], found[1], found[4]), found[5], found[8]);
          best[of_pair] = __vimax3_s32(__vimax3_s32(left_best, found[9], found[12]), found[13], left_best);
        }
        const float level = page_numbers[from + of_half][lane % 4];
        const float2 needed = shared.needed[warp][from + of_half][lane / 4];
        const bool passes =
            static_cast<float>(best[0]) * level > needed.x || static_cast<float>(best[1]) * level > needed.y;
        pages |= passes ? 1u << of_half : 0u;
      }
      return pages << from;
    };

    const auto release = [&](int of_stage) {
      if (lane == 0) arrive(&shared.levels_empty[of_stage]);
    };
    // The stage of the next tile, which has arrived.
    const auto take_tile = [&] {
      wait(&shared.levels_full[stage], parity);
      const int taken = stage;
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
      return taken;
    };
    // Score adjacent tiles from a page of the batch on. Straight-line code: the compiler gives up products in flight
    // where they cross a loop's end.
    uint32_t passing = 0;
    const auto score_tiles = [&](auto count, int page) {
      int last_stage = 0;
#pragma unroll
      for (int of_count = 0; of_count < decltype(count)::value; ++of_count) {
        const int first = page + of_count * kTilePages, taken = take_tile();
        const uint64_t keys = descriptor(shared_address(shared.levels[taken]));
        multiply(first_half, keys);
        if (of_count > 0) {
          wait_products<1>();
          settle(second_half);
          release(last_stage);
          passing |= passing_pages(second_half, first - kHalfPages);
        }
        multiply(second_half, keys + kHalfPages * kPageBytes / 16);
        wait_products<1>();
        settle(first_half);
        passing |= passing_pages(first_half, first);
        last_stage = taken;
      }
      wait_products<0>();
      settle(second_half);
      release(last_stage);
      passing |= passing_pages(second_half, page + (decltype(count)::value - 1) * kTilePages + kHalfPages);
    };

    // Tiles with a page to score; the compiler has to know that a warp's threads agree.
    uint32_t tiles = scored | scored >> 1;
    tiles = __reduce_or_sync(0xFFFFFFFFu, (tiles | tiles >> 2) & kFirstPages);
    if (tiles == kFirstPages) {
      score_tiles(std::integral_constant<int, kTilesPerBatch>(), 0);
    } else {
#pragma unroll 1
      for (int page = 0; page < kBatchPages; page += kTilePages) {
        if (tiles >> page & 1u) {
          score_tiles(std::integral_constant<int, 1>(), page);
        } else {
          release(take_tile());
        }
      }
    }
    const uint32_t keep = decided | (scored & any_thread(shared, warpgroup, 2 + batch % 2, passing));
    if (lane == 0) arrive(&shared.batch_empty[batch_stage]);
    if (warp % 4 == 0 && !idle && first_page + lane < key_pages) kept[first_page + lane] = keep >> lane & 1u;
  }

  // Pages that no row here has to score.
  if (!idle) {
    const int stop = min(segment + kSegmentPages, key_pages);
    for (int page = segment + batches * kBatchPages + threadIdx.x % 128; page < stop; page += 128) kept[page] = 1;
  }
}

template <typename Number>
cudaError_t launch(const Arguments& a, int tiles, cudaStream_t stream) {
  const int bytes = sizeof(Shared);
  cudaError_t status = cudaFuncSetAttribute(low_bit_scores<Number>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(tiles, (a.key_pages + kSegmentPages - 1) / kSegmentPages, a.heads);
  low_bit_scores<Number><<<grid, kThreads, bytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

// Returns a CUDA error code. Strides count numbers; `is_half` tells float16 from bfloat16.
extern "C" int vllm_sparse_low_bit_scores(
    const void* query, const void* query_levels, const void* row_numbers, const void* key_levels, const void* means,
    const void* page_numbers, void* kept, const void* tile_chunk, const void* tile_row, const void* chunk_start,
    const void* first_query, const void* first_token, const void* context, const void* page_start, const void* pages,
    long long query_row_stride, long long query_head_stride, int tiles, int step_tokens, int blocks, int first_page,
    int padded_pages, int key_pages, int sink_pages, int local_tokens, int query_block, int heads, int group,
    int page_bounds, float scale, int is_half, void* stream) {
  const Arguments a{query,
                    static_cast<const int8_t*>(query_levels),
                    static_cast<const float*>(row_numbers),
                    static_cast<const int8_t*>(key_levels),
                    means,
                    static_cast<const float*>(page_numbers),
                    static_cast<uint8_t*>(kept),
                    static_cast<const int*>(tile_chunk),
                    static_cast<const int*>(tile_row),
                    static_cast<const int*>(chunk_start),
                    static_cast<const int*>(first_query),
                    static_cast<const int*>(first_token),
                    static_cast<const int*>(context),
                    static_cast<const int*>(page_start),
                    static_cast<const int*>(pages),
                    query_row_stride,
                    query_head_stride,
                    step_tokens,
                    blocks,
                    first_page,
                    padded_pages,
                    key_pages,
                    sink_pages,
                    local_tokens,
                    query_block,
                    heads,
                    group,
                    page_bounds,
                    scale};
  const auto on = static_cast<cudaStream_t>(stream);
  return is_half ? launch<__half>(a, tiles, on) : launch<__nv_bfloat16>(a, tiles, on);
}
