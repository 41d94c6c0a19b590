// The tokens of decode rows with the most attention by the 2-bit codes of their keys, as token lists, in two launches.
//
// The specification is vllm_sparse/kernels/code_scores/reference.py and, of what is kept, `top_tokens` in
// vllm_sparse/kernels/top_tokens/reference.py. Full pages have codes. The tokens of the last page, while it is not
// full, are always kept, and count by their keys themselves.
//
// The first kernel multiplies: each warp takes whole pages, whose tokens are the rows of the tensor cores' products and
// the query heads of the KV head their columns. Of a channel's number least + step * code the query's product is
// query * least, the same for all tokens of a page, plus (query * step) * code, so the codes themselves are multiplied.
// Products are stored less what is the same for a page's tokens, which keeps them small enough for 16 bits. Where the
// newest token fills a page, its codes are written first.
//
// The second kernel selects, by the blocks of one cluster for each list. A token's score is the largest log probability
// that a head gives it, in steps of 1/32 bit from 2^-32 to 1: so one histogram finds the least score kept. Of the
// tokens with exactly this score, the first are kept. Few tokens are looked at: the first kernel also stores the
// largest products of each group of tokens, and where as many groups as tokens are wanted reach a score, so do all
// tokens kept.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace cg = cooperative_groups;

namespace {

constexpr int kColumns = 8;  // Query heads of a KV head at most.
constexpr int kMultiprocessors = 132;
// Queries are multiplied as 1/16 of themselves, so that query * step does not exceed the range of 16 bits.
constexpr float kQueryShare = 1.0f / 16;
constexpr float kBitsOfE = 1.4426950408889634f;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kLargestCode = 3;
constexpr float kLargestHalf = 65504.0f;

// Of the first kernel.
constexpr int kProductWarps = 4, kProductBlocks = 4;  // Of a block; on a multiprocessor.
constexpr int kWaves = 4;                             // Of blocks, where lists are many: rows differ in length.
constexpr int kStages = 2;                            // Pages of a warp, on their way or multiplied.

// Of the second kernel.
constexpr int kWarps = 16;
constexpr int kBins = 1024, kBinsOfBit = 32;
// Histograms of a block: lanes of a warp that find one score add to several numbers.
constexpr int kCopies = 4;
constexpr int kMostBlocks = 8;  // Clusters of more wait for a free part of the device that is large enough.
constexpr int kBlocksAtOnce = 2 * kMultiprocessors;
// Most tokens of a list that one block selects from: if lists are few, and if other lists' blocks fill the device.
constexpr int kTokensOfOneBlock = 2048, kTokensAmongLists = 8192;
constexpr int kGroups = 8;               // Of a page's tokens: those with the same rest of their index by 8.
constexpr int kSelectBytes = 96 * 1024;  // Of shared memory, so that a multiprocessor holds two blocks.
constexpr int kMostSelectBytes = 200 * 1024;

struct Arguments {
  const void* query;        // [rows, query_heads, head_size]
  const void* cache;        // Keys: block * cache_block_stride + head * cache_head_stride + token * cache_token_stride.
                            // As the queries, or FP8 (e4m3).
  uint8_t* summaries;       // [blocks, kv_heads, block_size / page, width]
  const long long* starts;  // [rows] first token of each row's room, rising
  const int* contexts;      // [rows], 0 for rows that keep their lists
  const int* members;       // [rows] tokens of rows whose full pages are coded here, else 0; null: they have been
  const int* knobs;         // [rows, 3] budget, sink and recent tokens
  const int* block_table;   // [rows, blocks]
  int* slots;               // [rows * kv_heads, width]
  int* kept_tokens;         // [rows * kv_heads]
  // With room for capacity / page + rows pages of each KV head; binary logarithms. Heads come in pairs.
  half2* products;          // [kv_heads, pages, kGroups, head pairs, page / kGroups], less a page's offsets
  half2* largest_products;  // [kv_heads, pages, kGroups, head pairs]
  float* offsets;           // [kv_heads, pages, 2 * head pairs]
  float* partials;          // [rows * kv_heads, splits, kColumns, 2] largest product and sum of exponentials less it
  long long query_row_stride, query_head_stride, cache_block_stride, cache_head_stride, cache_token_stride;
  long long knob_stride, table_stride, width, capacity;
  float factor;  // Of products, for binary logarithms.
  int rows, kv_heads, group, page, block_size, splits, is_bfloat16, is_float8;
  int one_block_tokens;  // Most of a list that one block selects from.
  int room_pages;        // Of a list that one block selects from.
};

__device__ __forceinline__ float exp2_of(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

// The first page of a row's room for what pages have: rows do not overlap.
__device__ __forceinline__ long long page_room(const Arguments& a, int head, int row) {
  return head * (a.capacity / a.page + a.rows) + a.starts[row] / a.page + row;
}

__device__ __forceinline__ void multiply(float (&to)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                         unsigned b0, unsigned b1, const float (&from)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
      "%12, %13};"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]));
}

// Codes are multiplied as 16-bit floats below the least normal one: an integer in the lowest bits is so many 2^-24.
constexpr float kCodeShare = 1.0f / (1 << 24);

// 4^field times two codes of a word, those of one field in the first byte of each of its halves.
__device__ __forceinline__ unsigned code_pair(unsigned word, int field) { return word & (0x00030003u << (2 * field)); }

__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Two adjacent registers hold channels c to c + 3; a pair is c and c + 2, or c + 1 and c + 3.
__device__ __forceinline__ unsigned pair_of(unsigned low, unsigned high, int byte) {
  return __byte_perm(low, high, byte ? 0x7632 : 0x5410);
}

// A pair of the cache's numbers as 16-bit floats.
__device__ __forceinline__ unsigned half_pair(unsigned pair, bool is_bfloat16, float share) {
  float2 numbers;
  if (is_bfloat16) {
    numbers = make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  } else {
    numbers = __half22float2(*reinterpret_cast<const half2*>(&pair));
  }
  const half2 two = __floats2half2_rn(numbers.x * share, numbers.y * share);
  return *reinterpret_cast<const unsigned*>(&two);
}

template <int kWords>
struct Words {
  unsigned of[kWords];
};

template <int kWords>
__device__ __forceinline__ Words<kWords> load(const void* from) {
  Words<kWords> words;
  if constexpr (kWords == 1) {
    words.of[0] = *static_cast<const unsigned*>(from);
  } else if constexpr (kWords == 2) {
    const uint2 two = *static_cast<const uint2*>(from);
    words.of[0] = two.x, words.of[1] = two.y;
  } else {
#pragma unroll
    for (int word = 0; word < kWords; word += 4) {
      const uint4 four = static_cast<const uint4*>(from)[word / 4];
      words.of[word] = four.x, words.of[word + 1] = four.y, words.of[word + 2] = four.z, words.of[word + 3] = four.w;
    }
  }
  return words;
}

// Two FP8 numbers as 16-bit floats, which hold all of them exactly.
__device__ __forceinline__ unsigned half_pair_of_float8(unsigned pair) {
  const __half2_raw two = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return static_cast<unsigned>(two.y) << 16 | two.x;
}

template <bool kFloat8>
__device__ __forceinline__ float cache_number(const Arguments& a, long long index) {
  if constexpr (kFloat8) {
    const __half_raw number = __nv_cvt_fp8_to_halfraw(static_cast<const uint8_t*>(a.cache)[index], __NV_E4M3);
    return __half2float(__half(number));
  } else {
    const uint16_t number = static_cast<const uint16_t*>(a.cache)[index];
    return a.is_bfloat16 ? __uint_as_float(static_cast<unsigned>(number) << 16) : __half2float(__ushort_as_half(number));
  }
}

// Four numbers of the cache, FP8 as 16-bit floats.
template <bool kFloat8>
__device__ __forceinline__ Words<2> cache_numbers(const Arguments& a, long long index) {
  if constexpr (kFloat8) {
    const unsigned four = load<1>(static_cast<const uint8_t*>(a.cache) + index).of[0];
    Words<2> words;
    words.of[0] = half_pair_of_float8(four & 0xFFFF), words.of[1] = half_pair_of_float8(four >> 16);
    return words;
  } else {
    return load<2>(static_cast<const uint16_t*>(a.cache) + index);
  }
}

// Writes the codes of a full page; all threads of the block call it.
template <int kHeadSize, int kPage, bool kFloat8>
__device__ void encode(const Arguments& a, int row, int head, int page) {
  constexpr int kThreads = kProductWarps * 32, kQuarter = kHeadSize / 4;
  __shared__ float leasts[kHeadSize], inverses[kHeadSize];
  const int pages_per_block = a.block_size / kPage;
  const long long block = a.block_table[row * a.table_stride + page / pages_per_block];
  const long long keys = block * a.cache_block_stride + head * a.cache_head_stride +
                         page % pages_per_block * kPage * a.cache_token_stride;
  uint8_t* const to = a.summaries + ((block * a.kv_heads + head) * pages_per_block + page % pages_per_block) *
                                        (4 * kHeadSize + kPage * kQuarter);
  for (int channel = threadIdx.x; channel < kHeadSize; channel += kThreads) {
    float smallest = INFINITY, largest = -INFINITY;
#pragma unroll 16
    for (int token = 0; token < kPage; ++token) {
      const float number = cache_number<kFloat8>(a, keys + token * a.cache_token_stride + channel);
      smallest = fminf(smallest, number);
      largest = fmaxf(largest, number);
    }
    const half least = __float2half_rn(fminf(fmaxf(smallest, -kLargestHalf), kLargestHalf));
    const half step = __float2half_rn(fminf((largest - __half2float(least)) / kLargestCode, kLargestHalf));
    reinterpret_cast<half*>(to)[channel] = least;
    reinterpret_cast<half*>(to)[kHeadSize + channel] = step;
    leasts[channel] = __half2float(least);
    // A channel whose numbers are all equal has steps of 0, and codes of 0.
    inverses[channel] = __half2float(step) > 0 ? 1 / __half2float(step) : 0;
  }
  __syncthreads();
#pragma unroll 4
  for (int index = threadIdx.x; index < kPage * kQuarter; index += kThreads) {
    const int token = index / kQuarter, first = index % kQuarter;
    unsigned packed = 0;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int channel = first + quarter * kQuarter;
      const float number = cache_number<kFloat8>(a, keys + token * a.cache_token_stride + channel);
      const float code = floorf((number - leasts[channel]) * inverses[channel] + 0.5f);
      packed |= static_cast<unsigned>(fminf(fmaxf(code, 0.0f), kLargestCode)) << (2 * quarter);
    }
    to[4 * kHeadSize + index] = packed;
  }
  __threadfence_block();
  __syncthreads();
}

template <int kHeadSize, int kPage, int kHeadPairs, bool kFloat8>
__global__ void __launch_bounds__(kProductWarps * 32, kProductBlocks)
    code_products(const __grid_constant__ Arguments a) {
  constexpr int kWords = kHeadSize / 64;  // Of a token's codes, for a thread.
  constexpr int kPairs = 8 * kWords;      // Of channels, for a thread: 4 fields of 2 bytes of a word's halves.
  constexpr int kQuarter = kHeadSize / 4, kNumbersBytes = 4 * kHeadSize;
  constexpr int kTiles = kPage / 16;
  constexpr int kPageBytes = kNumbersBytes + kPage * kQuarter, kPieces = kPageBytes / 16;
  __shared__ __align__(16) uint8_t staged[kProductWarps][kStages][kPageBytes];
  __shared__ uint4 queries[kPairs / 4][32];
  __shared__ float warp_most[kProductWarps][kColumns], warp_sums[kProductWarps][kColumns];

  const int list = blockIdx.y, row = list / a.kv_heads, head = list % a.kv_heads, split = blockIdx.x;
  const int context = a.contexts[row], member = a.members == nullptr ? 0 : a.members[row];
  const int pages = (context + kPage - 1) / kPage, pages_of_split = (pages + a.splits - 1) / a.splits;
  const int full_pages = context / kPage;
  // The split of the last page also has the one that the newest token fills.
  const bool is_last = split == (context == 0 ? 0 : (pages - 1) / pages_of_split);
  if (is_last && member > 0 && member % kPage == 0) encode<kHeadSize, kPage, kFloat8>(a, row, head, member / kPage - 1);
  if (context == 0) return;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int group_row = lane / 4, quad = lane % 4;
  const bool is_bfloat16 = a.is_bfloat16;

  const int* const table = a.block_table + row * a.table_stride;
  const int pages_per_block = a.block_size / kPage;
  const int first_page = split * pages_of_split + warp, last_page = min((split + 1) * pages_of_split, full_pages);
  const auto block_of = [&](int page) { return page < last_page ? table[page / pages_per_block] : 0; };
  const auto fetch = [&](int page, int block, int stage) {
    if (page < last_page) {
      const long long index = (static_cast<long long>(block) * a.kv_heads + head) * pages_per_block;
      const uint8_t* const from = a.summaries + (index + page % pages_per_block) * kPageBytes;
#pragma unroll
      for (int piece = lane; piece < kPieces; piece += 32) {
        const unsigned to = __cvta_generic_to_shared(&staged[warp][stage][16 * piece]);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from + 16 * piece) : "memory");
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  static_assert(kStages == 2);
  // A block's number is read two pages ahead, because the addresses of a page's codes wait for it.
  const int second_block = block_of(first_page + kProductWarps);
  fetch(first_page, block_of(first_page), 0);
  fetch(first_page + kProductWarps, second_block, 1);
  int next_block = block_of(first_page + 2 * kProductWarps);

  // The pairs of channels of this thread's words, of the query head of its column.
  unsigned query[kPairs];
  {
    const bool exists = group_row < a.group;
    const uint16_t* const from = static_cast<const uint16_t*>(a.query) + row * a.query_row_stride +
                                 (head * a.group + (exists ? group_row : 0)) * a.query_head_stride;
    Words<2> numbers[kPairs / 2];
#pragma unroll
    for (int index = 0; index < kPairs / 2; ++index) {
      const int word = index / 4, field = index % 4;
      numbers[index] = load<2>(from + 4 * (kWords * quad + word) + kQuarter * field);
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const Words<2>& four = numbers[pair / 8 * 4 + pair % 4];
      query[pair] = half_pair(pair_of(four.of[0], four.of[1], pair / 4 % 2), is_bfloat16, exists ? kQueryShare : 0.0f);
    }
  }
  // The same for all warps; each of them writes it, so that none has to wait.
#pragma unroll
  for (int index = 0; index < kPairs / 4; ++index) {
    queries[index][lane] =
        make_uint4(query[4 * index], query[4 * index + 1], query[4 * index + 2], query[4 * index + 3]);
  }
  __syncwarp();
  // From here on of 4^-field of the query, because codes come as 4^field of themselves.
  constexpr unsigned kShares[4] = {0x3C003C00u, 0x34003400u, 0x2C002C00u, 0x24002400u};  // 1, 1/4, 1/16, 1/64
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) query[pair] = times(query[pair], kShares[pair % 4]);

  const bool stores = quad < kHeadPairs;
  const long long room = page_room(a, head, row);
  half2* const products = a.products + ((room * kGroups + group_row) * kHeadPairs + quad) * (kPage / kGroups);
  half2* const largest_products = a.largest_products + (room * kGroups + group_row) * kHeadPairs + quad;
  float* const offsets = a.offsets + (room * kHeadPairs + quad) * 2;
  float most[2] = {-INFINITY, -INFINITY}, sums[2] = {0, 0};

  // Adds products of some tokens to the largest ones and the sums.
  const auto add = [&](int column, float largest, const auto& sum_less) {
    const float more = fmaxf(most[column], largest);
    sums[column] = sums[column] * exp2_of(most[column] - more) + sum_less(more);
    most[column] = more;
  };

  int stage = 0;
  for (int page = first_page; page < last_page; page += kProductWarps) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
    const uint8_t* const from = staged[warp][stage];
    Words<2 * kWords> least[4], step[4];
#pragma unroll
    for (int field = 0; field < 4; ++field) {
      const uint8_t* const at = from + 2 * (kQuarter * field + 4 * kWords * quad);
      least[field] = load<2 * kWords>(at);
      step[field] = load<2 * kWords>(at + 2 * kHeadSize);
    }
    // All rows of this product are the same: what tokens share.
    float page_product[4] = {};
    unsigned scaled[kPairs];
#pragma unroll
    for (int pair = 0; pair < kPairs; pair += 4) {
      const uint4 whole = queries[pair / 4][lane];
      const unsigned whole_query[4] = {whole.x, whole.y, whole.z, whole.w};
      const int word = pair / 8, byte = pair / 4 % 2;
      unsigned shared[4];
#pragma unroll
      for (int field = 0; field < 4; ++field) {
        shared[field] = pair_of(least[field].of[2 * word], least[field].of[2 * word + 1], byte);
        scaled[pair + field] =
            times(query[pair + field], pair_of(step[field].of[2 * word], step[field].of[2 * word + 1], byte));
      }
#pragma unroll
      for (int field = 0; field < 4; field += 2) {
        multiply(page_product, shared[field], shared[field], shared[field + 1], shared[field + 1], whole_query[field],
                 whole_query[field + 1], page_product);
      }
    }
    float product[kTiles][4] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint8_t* const at = from + kNumbersBytes + (tile * 16 + group_row) * kQuarter + 4 * kWords * quad;
      const Words<kWords> codes[2] = {load<kWords>(at), load<kWords>(at + 8 * kQuarter)};
#pragma unroll
      for (int pair = 0; pair < kPairs; pair += 2) {
        const int word = pair / 8, shift = pair / 4 % 2 * 8, field = pair % 4;
        const unsigned one = codes[0].of[word] >> shift, other = codes[1].of[word] >> shift;
        multiply(product[tile], code_pair(one, field), code_pair(other, field), code_pair(one, field + 1),
                 code_pair(other, field + 1), scaled[pair], scaled[pair + 1], product[tile]);
      }
    }
    __syncwarp();
    const int coming = page + 2 * kProductWarps;
    fetch(coming, next_block, stage);
    next_block = block_of(coming + kProductWarps);
    stage = 1 - stage;

    half2 pairs[kPage / kGroups], largest = __floats2half2_rn(-INFINITY, -INFINITY);
#pragma unroll
    for (int index = 0; index < kPage / kGroups; ++index) {
      float* const two = &product[index / 2][index % 2 * 2];
      two[0] *= a.factor / kCodeShare, two[1] *= a.factor / kCodeShare;
      pairs[index] = __floats2half2_rn(two[0], two[1]);
      largest = __hmax2(largest, pairs[index]);
    }
    if (stores) {
      largest_products[static_cast<long long>(page) * kGroups * kHeadPairs] = largest;
      auto* const to = reinterpret_cast<uint4*>(products + static_cast<long long>(page) * kHeadPairs * kPage);
#pragma unroll
      for (int index = 0; index < kPage / kGroups / 4; ++index) {
        to[index] = reinterpret_cast<const uint4*>(pairs)[index];
      }
    }
    const float page_most[2] = {__low2float(largest), __high2float(largest)};
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float offset = page_product[column] * a.factor;
      if (stores && group_row == 0) offsets[static_cast<long long>(page) * 2 * kHeadPairs + column] = offset;
      add(column, page_most[column] + offset, [&](float more) {
        const float less = offset - more;
        float sum = 0;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          sum += exp2_of(product[tile][column] + less) + exp2_of(product[tile][2 + column] + less);
        }
        return sum;
      });
    }
  }

  if (is_last && full_pages < pages) {
    // The keys themselves; every warp has tiles of its own.
    const long long block = table[full_pages / pages_per_block];
    const long long keys = block * a.cache_block_stride + head * a.cache_head_stride +
                           full_pages % pages_per_block * kPage * a.cache_token_stride;
    const bool keys_are_bfloat16 = is_bfloat16 && !kFloat8;
    const int tokens = context - full_pages * kPage;
    for (int first = warp * 16; first < tokens; first += kProductWarps * 16) {
      float product_of_keys[4] = {};
#pragma unroll
      for (int pair = 0; pair < kPairs; pair += 4) {
        const uint4 whole = queries[pair / 4][lane];
        const unsigned whole_query[4] = {whole.x, whole.y, whole.z, whole.w};
        const int word = pair / 8, byte = pair / 4 % 2;
        unsigned numbers[2][4];
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          // Tokens that do not exist are not read, and do not count.
          const int token = min(first + upper * 8 + group_row, tokens - 1);
#pragma unroll
          for (int field = 0; field < 4; ++field) {
            const Words<2> four =
                cache_numbers<kFloat8>(a, keys + token * a.cache_token_stride + 4 * (kWords * quad + word) + kQuarter * field);
            numbers[upper][field] = half_pair(pair_of(four.of[0], four.of[1], byte), keys_are_bfloat16, 1.0f);
          }
        }
#pragma unroll
        for (int field = 0; field < 4; field += 2) {
          multiply(product_of_keys, numbers[0][field], numbers[1][field], numbers[0][field + 1], numbers[1][field + 1],
                   whole_query[field], whole_query[field + 1], product_of_keys);
        }
      }
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        if (first + upper * 8 + group_row < tokens) {
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            const float number = product_of_keys[2 * upper + column] * a.factor;
            add(column, number, [&](float more) { return exp2_of(number - more); });
          }
        }
      }
    }
  }

#pragma unroll
  for (int column = 0; column < 2; ++column) {
    for (int distance = 4; distance < 32; distance *= 2) {
      const float other_most = __shfl_xor_sync(kAll, most[column], distance);
      const float other_sum = __shfl_xor_sync(kAll, sums[column], distance);
      const float more = fmaxf(most[column], other_most);
      // Both are minus infinity where a warp had no page.
      const float own = most[column] == more ? 1.0f : exp2_of(most[column] - more);
      const float others = other_most == more ? 1.0f : exp2_of(other_most - more);
      sums[column] = sums[column] * own + other_sum * others;
      most[column] = more;
    }
    if (group_row == 0) {
      warp_most[warp][2 * quad + column] = most[column];
      warp_sums[warp][2 * quad + column] = sums[column];
    }
  }
  __syncthreads();
  if (thread < kColumns) {
    float largest = -INFINITY, sum = 0;
    for (int other = 0; other < kProductWarps; ++other) largest = fmaxf(largest, warp_most[other][thread]);
    for (int other = 0; other < kProductWarps; ++other) {
      if (warp_sums[other][thread] > 0) sum += warp_sums[other][thread] * exp2_of(warp_most[other][thread] - largest);
    }
    float* const to = a.partials + ((static_cast<long long>(list) * a.splits + split) * kColumns + thread) * 2;
    *reinterpret_cast<float2*>(to) = make_float2(largest, sum);
  }
}

// What a block of the second kernel has in shared memory for so many pages of a list.
__host__ __device__ inline int select_bytes(int pages, int page, int block_size) {
  // Two bits for each token, and those of a last page; groups' scores and their list; cache blocks.
  return 2 * 4 * ((pages + 1) * page / 32) + 2 * 2 * pages * kGroups + 4 * (pages * page / block_size + 2);
}

template <int kPage, int kHeadPairs>
__global__ void __launch_bounds__(kWarps * 32, 2) select_tokens(const __grid_constant__ Arguments a) {
  constexpr int kThreads = kWarps * 32, kBinsOfThread = kBins / kThreads;
  constexpr int kGroupTokens = kPage / kGroups;
  extern __shared__ __align__(16) uint8_t memory[];
  __shared__ __align__(16) int histogram[kBins * kCopies];
  __shared__ int counts[2][kBins];
  __shared__ float log_sums[kColumns];
  __shared__ unsigned long long warp_counts[kWarps];
  __shared__ int chosen_bin, chosen_above, lower_above, lower_equal, candidates;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int list = blockIdx.y, row = list / a.kv_heads, head = list % a.kv_heads;
  // Read together, because each waits for memory.
  const int context = a.contexts[row];
  const int* const knobs = a.knobs + row * a.knob_stride;
  const int budget = knobs[0], sink = knobs[1], recent = knobs[2];
  const long long row_room = page_room(a, head, row);
  if (context == 0) return;
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), most_blocks = cluster.num_blocks();
  const int blocks = context <= a.one_block_tokens ? 1 : most_blocks;
  if (rank >= blocks) return;
  const auto wait_for_all = [&] {
    if (blocks > 1) {
      cluster.sync();
    } else {
      __syncthreads();
    }
  };
  // The last block also has the page that is not full.
  const int full_pages = context / kPage, pages_of_block = (full_pages + blocks - 1) / blocks;
  const int first_page = min(rank * pages_of_block, full_pages),
            last_page = min(first_page + pages_of_block, full_pages);
  const int first_token = first_page * kPage;
  const int tokens = (rank == blocks - 1 ? context : last_page * kPage) - first_token;
  const int groups = (last_page - first_page) * kGroups, words = (tokens + 31) / 32;
  const int sink_tokens = min(sink, context);
  const int first_recent = max(min(context - max(recent, 1), full_pages * kPage), sink_tokens);
  const int forced = sink_tokens + context - first_recent;
  const int kept_tokens = min(max(budget, forced), context), wanted = kept_tokens - forced;

  auto* const kept = reinterpret_cast<unsigned*>(memory);  // A bit for each token, and for those that tie.
  unsigned* const tying = kept + (a.room_pages + 1) * kPage / 32;
  auto* const table = reinterpret_cast<int*>(tying + (a.room_pages + 1) * kPage / 32);
  auto* const group_bins = reinterpret_cast<unsigned short*>(table + a.room_pages * kPage / a.block_size + 2);
  unsigned short* const candidate_groups = group_bins + a.room_pages * kGroups;
  const int first_block = first_token / a.block_size;
  for (int index = thread; index < kBins * kCopies; index += kThreads) histogram[index] = 0;
  for (int word = thread; word < words; word += kThreads) kept[word] = tying[word] = 0;
  for (int index = thread; index * a.block_size < first_token % a.block_size + tokens; index += kThreads) {
    table[index] = a.block_table[row * a.table_stride + first_block + index];
  }
  if (thread == 0) chosen_bin = candidates = 0;

  const long long room = row_room + first_page;
  half2* const products = a.products + room * kPage * kHeadPairs;
  const half2* const largest_products = a.largest_products + room * kGroups * kHeadPairs;
  const float* const offsets = a.offsets + room * 2 * kHeadPairs;

  if (warp < a.group) {
    const float2* const from =
        reinterpret_cast<const float2*>(a.partials) + static_cast<long long>(list) * a.splits * kColumns + warp;
    float largest = -INFINITY, sum = 0;
#pragma unroll 4
    for (int split = lane; split < a.splits; split += 32) {
      const float2 partial = from[split * kColumns];
      const float more = fmaxf(largest, partial.x);
      // A split without tokens has minus infinity and 0.
      if (partial.y > 0) sum = sum * exp2_of(largest - more) + partial.y * exp2_of(partial.x - more);
      largest = more;
    }
    for (int distance = 1; distance < 32; distance *= 2) {
      const float other = __shfl_xor_sync(kAll, largest, distance), other_sum = __shfl_xor_sync(kAll, sum, distance);
      const float more = fmaxf(largest, other);
      sum = (sum > 0 ? sum * exp2_of(largest - more) : 0) + (other_sum > 0 ? other_sum * exp2_of(other - more) : 0);
      largest = more;
    }
    if (lane == 0) log_sums[warp] = largest + log2f(sum);
  }
  __syncthreads();
  float less[2 * kHeadPairs];
#pragma unroll
  for (int column = 0; column < 2 * kHeadPairs; ++column) less[column] = column < a.group ? log_sums[column] : INFINITY;
  struct Numbers {
    half2 products[kHeadPairs];
    Words<2 * kHeadPairs> offsets;
  };
  // Products of one page, those of a head pair after those of the one before.
  const auto read = [&](const half2* from, int stride, int page) {
    Numbers numbers;
#pragma unroll
    for (int pair = 0; pair < kHeadPairs; ++pair) numbers.products[pair] = from[pair * stride];
    numbers.offsets = load<2 * kHeadPairs>(offsets + page * 2 * kHeadPairs);
    return numbers;
  };
  const auto bin_of = [&](const Numbers& numbers) {
    float score = -INFINITY;
#pragma unroll
    for (int pair = 0; pair < kHeadPairs; ++pair) {
      const float2 two = __half22float2(numbers.products[pair]);
      const unsigned* const offset = &numbers.offsets.of[2 * pair];
      score = fmaxf(score, two.x + (__uint_as_float(offset[0]) - less[2 * pair]));
      score = fmaxf(score, two.y + (__uint_as_float(offset[1]) - less[2 * pair + 1]));
    }
    return min(max(static_cast<int>((score + kBins / kBinsOfBit) * kBinsOfBit), 0), kBins - 1);
  };
  // Sets the variables to the largest bin that so many of all blocks' counts reach, 0 if they are fewer.
  const auto choose = [&](int number, int reached) {
    __syncthreads();
    for (int bin = thread; bin < kBins; bin += kThreads) {
      int4& copies = reinterpret_cast<int4*>(histogram)[bin];
      counts[number][bin] = copies.x + copies.y + copies.z + copies.w;
      copies = make_int4(0, 0, 0, 0);
    }
    wait_for_all();
    // From the largest bin down: of all blocks, and in the upper half of a number of those before this one.
    unsigned long long own[kBinsOfThread] = {}, reaching = 0;
    const int lowest_bin = kBins - (thread + 1) * kBinsOfThread;
#pragma unroll
    for (int other = 0; other < kMostBlocks; ++other) {
      if (other >= blocks) continue;
      const int* const from = cluster.map_shared_rank(counts[number], other) + lowest_bin;
      const unsigned long long share = other < rank ? (1ull << 32) + 1 : 1;
#pragma unroll
      for (int index = 0; index < kBinsOfThread; ++index) own[index] += share * static_cast<unsigned>(from[index]);
    }
#pragma unroll
    for (int index = 0; index < kBinsOfThread; ++index) reaching += own[index];
    // No block may end while others read its shared memory; they have done so when they arrive here.
    if (number == 1 && blocks > 1) asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned long long before = __shfl_up_sync(kAll, reaching, distance);
      if (lane >= distance) reaching += before;
    }
    if (lane == 31) warp_counts[warp] = reaching;
    __syncthreads();
    for (int before = 0; before < warp; ++before) reaching += warp_counts[before];
#pragma unroll
    for (int index = 0; index < kBinsOfThread; ++index) {
      // From this thread's lowest bin up.
      const int through = static_cast<int>(reaching & kAll), above = through - static_cast<int>(own[index] & kAll);
      if (through >= reached && above < reached) {
        chosen_bin = lowest_bin + index;
        chosen_above = above;
        lower_above = static_cast<int>(reaching >> 32) - static_cast<int>(own[index] >> 32);
        lower_equal = static_cast<int>(own[index] >> 32);
      }
      reaching -= own[index];
    }
    __syncthreads();
  };

  // Groups of pages with tokens that do not compete are looked at in any case.
  for (int index = thread; index < groups; index += kThreads) {
    const int page = index / kGroups, position = first_token + page * kPage;
    int bin = kBins - 1;
    if (position >= sink_tokens && position + kPage <= first_recent) {
      bin = bin_of(read(largest_products + index * kHeadPairs, 1, page));
      atomicAdd(&histogram[bin * kCopies + lane % kCopies], 1);
    }
    group_bins[index] = bin;
  }
  choose(0, wanted);
  const int bound = chosen_bin;
  for (int from = warp * 32; from < groups; from += kThreads) {
    const int index = from + lane;
    const bool is_candidate = wanted > 0 && index < groups && group_bins[index] >= bound;
    const unsigned mask = __ballot_sync(kAll, is_candidate);
    int place = 0;
    if (lane == 0) place = atomicAdd(&candidates, __popc(mask));
    place = __shfl_sync(kAll, place, 0) + __popc(mask & ((1u << lane) - 1));
    if (is_candidate) candidate_groups[place] = index;
  }
  __syncthreads();
  if (thread == 0) chosen_bin = 0;
  const int looked_at = candidates * kGroupTokens;
  const auto token_of = [](int group, int in_group) {
    return group / kGroups * kPage + group % kGroups + in_group * kGroups;
  };
  // Several tokens of a thread are read before the first is looked at.
  constexpr int kAtOnce = kHeadPairs == 4 ? 2 : 4;
  const auto place_of = [&](int index) {
    return candidate_groups[index / kGroupTokens] * kHeadPairs * kGroupTokens + index % kGroupTokens;
  };
  for (int from = thread; from < looked_at; from += kAtOnce * kThreads) {
    Numbers numbers[kAtOnce];
#pragma unroll
    for (int of = 0; of < kAtOnce; ++of) {
      const int index = min(from + of * kThreads, looked_at - 1);
      numbers[of] = read(products + place_of(index), kGroupTokens, candidate_groups[index / kGroupTokens] / kGroups);
    }
#pragma unroll
    for (int of = 0; of < kAtOnce; ++of) {
      const int index = from + of * kThreads;
      if (index >= looked_at) break;
      const int position = first_token + token_of(candidate_groups[index / kGroupTokens], index % kGroupTokens);
      const int bin = position < sink_tokens || position >= first_recent ? -1 : bin_of(numbers[of]);
      if (bin >= bound) atomicAdd(&histogram[bin * kCopies + lane % kCopies], 1);
      *reinterpret_cast<short*>(products + place_of(index)) = bin;
    }
  }
  choose(1, wanted);
  const int threshold = chosen_bin, remaining = wanted > 0 ? wanted - chosen_above : 0;
  for (int from = thread; from < looked_at; from += 2 * kAtOnce * kThreads) {
    int bins[2 * kAtOnce];
#pragma unroll
    for (int of = 0; of < 2 * kAtOnce; ++of) {
      const int index = min(from + of * kThreads, looked_at - 1);
      bins[of] = *reinterpret_cast<const short*>(products + place_of(index));
    }
#pragma unroll
    for (int of = 0; of < 2 * kAtOnce; ++of) {
      const int index = from + of * kThreads;
      if (index >= looked_at || bins[of] < threshold) continue;
      const int token = token_of(candidate_groups[index / kGroupTokens], index % kGroupTokens);
      atomicOr(&(bins[of] > threshold ? kept : tying)[token / 32], 1u << token % 32);
    }
  }
  __syncthreads();

  // Each thread writes the tokens of adjacent words after those of the threads before it.
  const int words_of_thread = (words + kThreads - 1) / kThreads;
  const int first = min(thread * words_of_thread, words), last = min(first + words_of_thread, words);
  // Bits of a word's tokens from one position to another.
  const auto range = [&](int word, int from, int to) {
    const int low = min(max(from - first_token - word * 32, 0), 32),
              high = min(max(to - first_token - word * 32, 0), 32);
    return high <= low ? 0u : (kAll >> (32 - (high - low))) << low;
  };
  unsigned long long own = 0;
  for (int word = first; word < last; ++word) {
    kept[word] |= range(word, 0, sink_tokens) | range(word, first_recent, context);
    own += static_cast<unsigned long long>(__popc(tying[word])) << 32 | static_cast<unsigned>(__popc(kept[word]));
  }
  unsigned long long before = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long other = __shfl_up_sync(kAll, before, distance);
    if (lane >= distance) before += other;
  }
  __syncthreads();  // `warp_counts` have been read.
  if (lane == 31) warp_counts[warp] = before;
  __syncthreads();
  before -= own;
  for (int other = 0; other < warp; ++other) before += warp_counts[other];
  const int forced_before = min(first_token, sink_tokens) + max(first_token - first_recent, 0);
  int equal_before = static_cast<int>(before >> 32), written = forced_before + static_cast<int>(before & kAll);
  if (wanted > 0) equal_before += lower_equal, written += lower_above;
  written += min(equal_before, remaining);
  int* const slots = a.slots + list * a.width;
  for (int word = first; word < last; ++word) {
    const unsigned ties = tying[word];
    unsigned bits = kept[word] | ties;
    if (bits == 0) continue;
    // A page, and so a word's tokens, lie in one block of the cache.
    const int position = first_token + word * 32, block = position / a.block_size;
    const int slot = (table[block - first_block] * a.kv_heads + head) * a.block_size + position - block * a.block_size;
    for (; bits != 0; bits &= bits - 1) {
      const int bit = __ffs(bits) - 1;
      if (ties >> bit & 1 && equal_before++ >= remaining) continue;
      slots[written++] = slot + bit;
    }
  }
  if (rank == 0 && thread == 0) a.kept_tokens[list] = kept_tokens;
  if (blocks > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Calls `use` with integral constants of a page's tokens and of the head pairs.
template <typename Use>
cudaError_t with_shape(int page, int head_pairs, const Use& use) {
  const auto with_page = [&](auto tokens) {
    switch (head_pairs) {
      case 1:
        return use(tokens, std::integral_constant<int, 1>{});
      case 2:
        return use(tokens, std::integral_constant<int, 2>{});
      default:
        return use(tokens, std::integral_constant<int, 4>{});
    }
  };
  switch (page) {
    case 32:
      return with_page(std::integral_constant<int, 32>{});
    case 64:
      return with_page(std::integral_constant<int, 64>{});
    default:
      return with_page(std::integral_constant<int, 128>{});
  }
}

template <int kPage, int kHeadPairs, bool kFloat8>
auto products_of(int head_size) {
  return head_size == 64 ? code_products<64, kPage, kHeadPairs, kFloat8>
                         : code_products<128, kPage, kHeadPairs, kFloat8>;
}

template <int kPage, int kHeadPairs>
cudaError_t run(const Arguments& a, int head_size, int blocks, cudaStream_t stream) {
  const int lists = a.rows * a.kv_heads;
  const auto products = a.is_float8 ? products_of<kPage, kHeadPairs, true>(head_size)
                                    : products_of<kPage, kHeadPairs, false>(head_size);
  cudaError_t status =
      cudaFuncSetAttribute(products, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return status;
  products<<<dim3(a.splits, lists), kProductWarps * 32, 0, stream>>>(a);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;

  const auto select = select_tokens<kPage, kHeadPairs>;
  const int bytes = select_bytes(a.room_pages, a.page, a.block_size);
  status = cudaFuncSetAttribute(select, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks, lists);
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, select, a);
}

}  // namespace

// Parts of each list in `partials`.
extern "C" int vllm_sparse_top_coded_tokens_splits(int lists) {
  constexpr int kBlocks = kProductBlocks * kMultiprocessors;
  return lists <= kBlocks / 4 ? std::max(kBlocks / lists, 1) : std::max(kWaves * kBlocks / lists, 1);
}

// Returns a CUDA error code. Strides count numbers; `longest` is the most tokens of a row.
extern "C" int vllm_sparse_top_coded_tokens(
    const void* query, const void* cache, void* summaries, const void* starts, const void* contexts,
    const void* members, const void* knobs, const void* block_table, void* slots, void* kept_tokens, void* products,
    void* largest_products, void* offsets, void* partials, long long query_row_stride, long long query_head_stride,
    long long cache_block_stride, long long cache_head_stride, long long cache_token_stride, long long knob_stride,
    long long table_stride, long long width, long long capacity, long long longest, float scale, int rows, int kv_heads,
    int group, int head_pairs, int head_size, int page, int block_size, int splits, int is_bfloat16, int is_float8,
    void* stream) {
  int blocks = kMostBlocks;
  while (blocks > 1 && rows * kv_heads * blocks > kBlocksAtOnce) blocks /= 2;
  const int one_block = blocks == kMostBlocks ? kTokensOfOneBlock : kTokensAmongLists;
  const auto room_pages = [&] {
    const long long tokens = std::max(std::min<long long>(one_block, longest), (longest + blocks - 1) / blocks);
    return static_cast<int>((tokens + page - 1) / page);
  };
  while (blocks < kMostBlocks && select_bytes(room_pages(), page, block_size) > kSelectBytes) blocks *= 2;
  if (select_bytes(room_pages(), page, block_size) > kMostSelectBytes) return cudaErrorInvalidValue;
  const Arguments arguments{query,
                            cache,
                            static_cast<uint8_t*>(summaries),
                            static_cast<const long long*>(starts),
                            static_cast<const int*>(contexts),
                            static_cast<const int*>(members),
                            static_cast<const int*>(knobs),
                            static_cast<const int*>(block_table),
                            static_cast<int*>(slots),
                            static_cast<int*>(kept_tokens),
                            static_cast<half2*>(products),
                            static_cast<half2*>(largest_products),
                            static_cast<float*>(offsets),
                            static_cast<float*>(partials),
                            query_row_stride,
                            query_head_stride,
                            cache_block_stride,
                            cache_head_stride,
                            cache_token_stride,
                            knob_stride,
                            table_stride,
                            width,
                            capacity,
                            scale * kBitsOfE / kQueryShare,
                            rows,
                            kv_heads,
                            group,
                            page,
                            block_size,
                            splits,
                            is_bfloat16,
                            is_float8,
                            one_block,
                            room_pages()};
  return with_shape(page, head_pairs, [&](auto tokens, auto pairs) {
    return run<tokens.value, pairs.value>(arguments, head_size, blocks, static_cast<cudaStream_t>(stream));
  });
}
