// Quantises the keys of whole pages, less the page's mean, to 8-bit integers: one warp per page, in its registers.
//
// Pages of several requests lie one request after another, each with its last batch of pages filled up.
//
// The specification is `quantise_keys` in vllm_sparse/kernels/low_bit_scores/reference.py.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "quantised_pages.cuh"

namespace {

using namespace vllm_sparse;

constexpr int kWarps = 4;
constexpr int kHalfPage = 16;  // Always in one block of the cache, whose length is a multiple of it.

struct Arguments {
  const void* cache;          // [blocks, kv_heads, block_size, 2 * 128]
  const int* block_table;     // [batch, blocks]
  const int* batch_chunk;     // [padded_pages / 32] prompt chunk of each batch of pages
  const int* page_start;      // [chunks + 1] first page of each chunk among those of all
  const int* pages;           // [chunks] pages of each chunk that are quantised
  const int* table_row;       // [chunks] row of its request in the block table
  int8_t* levels;             // [kv_heads, padded_pages, 32, 128], swizzled
  void* means;                // [kv_heads, padded_pages / 32, 2, 32, 64], swizzled
  float* numbers;             // [kv_heads, padded_pages, 8]
  long long table_row_stride, block_stride, head_stride, token_stride;
  int block_size, first_page, padded_pages, top_level;  // The first page here, among those of all chunks.
  float tiny, rounding;
};

// Two numbers of 16 bits as float32, and back.
template <typename Number>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float2 read(uint32_t bits) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&bits));
  }
  static __device__ __forceinline__ uint32_t write(float2 values) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(values);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct Pair<__half> {
  static __device__ __forceinline__ float2 read(uint32_t bits) {
    return __half22float2(*reinterpret_cast<__half2*>(&bits));
  }
  static __device__ __forceinline__ uint32_t write(float2 values) {
    const __half2 pair = __float22half2_rn(values);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// Floats that are not negative have the order of their bits.
__device__ __forceinline__ float warp_max(float value) {
  return __uint_as_float(__reduce_max_sync(0xFFFFFFFFu, __float_as_uint(value)));
}

// Each step halves the sums over the warp that a lane still holds parts of.
template <int kHalf>
__device__ __forceinline__ void share_sums(float (&parts)[kPageTokens], int lane) {
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? parts[i] : parts[i + kHalf];
    const float held = upper ? parts[i + kHalf] : parts[i];
    parts[i] = held + __shfl_xor_sync(0xFFFFFFFFu, given, kHalf);
  }
}

// Largest of 32 sums over the warp.
__device__ __forceinline__ float largest_sum(float (&parts)[kPageTokens], int lane) {
  share_sums<16>(parts, lane);
  share_sums<8>(parts, lane);
  share_sums<4>(parts, lane);
  share_sums<2>(parts, lane);
  share_sums<1>(parts, lane);
  return warp_max(parts[0]);
}

template <typename Number>
__global__ void __launch_bounds__(kWarps * 32, 3) quantise_keys(const __grid_constant__ Arguments a) {
  const int stored = blockIdx.x * kWarps + threadIdx.x / 32;
  const int kv_head = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int chunk = a.batch_chunk[stored / kBatchPages];
  const int page = a.first_page + stored - a.page_start[chunk];
  if (page >= a.pages[chunk]) return;
  const int* block_table = a.block_table + a.table_row[chunk] * a.table_row_stride;

  // Four channels of each token.
  uint2 raw[kPageTokens];
#pragma unroll
  for (int half = 0; half < kPageTokens / kHalfPage; ++half) {
    const int first = page * kPageTokens + half * kHalfPage;
    const long long block = block_table[first / a.block_size];
    const Number* keys = static_cast<const Number*>(a.cache) + block * a.block_stride + kv_head * a.head_stride +
                         first % a.block_size * a.token_stride + lane * 4;
#pragma unroll
    for (int token = 0; token < kHalfPage; ++token) {
      raw[half * kHalfPage + token] = *reinterpret_cast<const uint2*>(keys + token * a.token_stride);
    }
  }
  float4 mean = {0, 0, 0, 0};
#pragma unroll
  for (int token = 0; token < kPageTokens; ++token) {
    const float2 low = Pair<Number>::read(raw[token].x), high = Pair<Number>::read(raw[token].y);
    mean.x += low.x, mean.y += low.y, mean.z += high.x, mean.w += high.y;
  }
  const float share = 1.0f / kPageTokens;
  const uint2 rounded = {Pair<Number>::write({mean.x * share, mean.y * share}),
                         Pair<Number>::write({mean.z * share, mean.w * share})};
  const float2 mean_low = Pair<Number>::read(rounded.x), mean_high = Pair<Number>::read(rounded.y);
  const long long batch = (static_cast<long long>(kv_head) * a.padded_pages + stored) / kBatchPages;
  uint8_t* means = static_cast<uint8_t*>(a.means) + batch * kMeanBytes + lane / 16 * (kMeanBytes / 2);
  *reinterpret_cast<uint2*>(means + swizzled(stored % kBatchPages, lane % 16 * 8)) = rounded;

  // Converted again in each pass, because as float32 the keys do not fit the registers.
  auto rest = [&](int token) {
    asm volatile("" : "+r"(raw[token].x), "+r"(raw[token].y));
    const float2 low = Pair<Number>::read(raw[token].x), high = Pair<Number>::read(raw[token].y);
    return make_float4(low.x - mean_low.x, low.y - mean_low.y, high.x - mean_high.x, high.y - mean_high.y);
  };
  float parts[kPageTokens];
  float largest[kScaleGroups] = {0, 0, 0, 0};
#pragma unroll
  for (int token = 0; token < kPageTokens; ++token) {
    const float4 value = rest(token);
    parts[token] = value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
    const float of_token = fmaxf(fmaxf(fabsf(value.x), fabsf(value.y)), fmaxf(fabsf(value.z), fabsf(value.w)));
    largest[token % 8 / 2] = fmaxf(largest[token % 8 / 2], of_token);
  }
  const float radius = sqrtf(largest_sum(parts, lane));
  float scale[kScaleGroups], levels_per_unit[kScaleGroups];
#pragma unroll
  for (int group = 0; group < kScaleGroups; ++group) {
    scale[group] = fmaxf(warp_max(largest[group]) / a.top_level, a.tiny);
    levels_per_unit[group] = 1.0f / scale[group];
  }

  const long long out = static_cast<long long>(kv_head) * a.padded_pages + stored;
  int8_t* levels = a.levels + out * kPageBytes;
#pragma unroll
  for (int token = 0; token < kPageTokens; ++token) {
    const float4 value = rest(token);
    const float worth = scale[token % 8 / 2], per_unit = levels_per_unit[token % 8 / 2];
    const float x = floorf(value.x * per_unit + 0.5f), y = floorf(value.y * per_unit + 0.5f);
    const float z = floorf(value.z * per_unit + 0.5f), w = floorf(value.w * per_unit + 0.5f);
    const char4 level = make_char4(static_cast<signed char>(x), static_cast<signed char>(y),
                                   static_cast<signed char>(z), static_cast<signed char>(w));
    *reinterpret_cast<char4*>(levels + swizzled(token, lane * 4)) = level;
    const float4 left = {value.x - x * worth, value.y - y * worth, value.z - z * worth, value.w - w * worth};
    parts[token] = left.x * left.x + left.y * left.y + left.z * left.z + left.w * left.w;
  }
  const float mean_norm = sqrtf(warp_sum(mean_low.x * mean_low.x + mean_low.y * mean_low.y +
                                         mean_high.x * mean_high.x + mean_high.y * mean_high.y));
  const float rounding = (mean_norm + radius) * a.rounding;
  // With fewer bits the scores are the paper's, which have no margin for rounding.
  const float error = rounding + (a.top_level == 127 ? sqrtf(largest_sum(parts, lane)) : 0.0f);
  const float numbers[kPageNumbers] = {scale[0], scale[1], scale[2], scale[3], radius + rounding, error, 0, 0};
  if (lane < 2) {
    float4* to = reinterpret_cast<float4*>(a.numbers + out * kPageNumbers) + lane;
    *to = lane == 0 ? make_float4(numbers[0], numbers[1], numbers[2], numbers[3])
                    : make_float4(numbers[4], numbers[5], 0, 0);
  }
}

template <typename Number>
cudaError_t launch(const Arguments& a, int kv_heads, cudaStream_t stream) {
  static_assert(kBatchPages % kWarps == 0);
  const dim3 grid(a.padded_pages / kWarps, kv_heads);
  quantise_keys<Number><<<grid, kWarps * 32, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

// Returns a CUDA error code. Strides count numbers; `is_half` tells float16 from bfloat16.
extern "C" int vllm_sparse_quantise_keys(const void* cache, const void* block_table, const void* batch_chunk,
                                         const void* page_start, const void* pages, const void* table_row,
                                         void* levels, void* means, void* numbers, long long table_row_stride,
                                         long long block_stride, long long head_stride, long long token_stride,
                                         int block_size, int first_page, int padded_pages, int kv_heads, int top_level,
                                         float tiny, float rounding, int is_half, void* stream) {
  const Arguments a{cache,
                    static_cast<const int*>(block_table),
                    static_cast<const int*>(batch_chunk),
                    static_cast<const int*>(page_start),
                    static_cast<const int*>(pages),
                    static_cast<const int*>(table_row),
                    static_cast<int8_t*>(levels),
                    means,
                    static_cast<float*>(numbers),
                    table_row_stride,
                    block_stride,
                    head_stride,
                    token_stride,
                    block_size,
                    first_page,
                    padded_pages,
                    top_level,
                    tiny,
                    rounding};
  const auto on = static_cast<cudaStream_t>(stream);
  return is_half ? launch<__half>(a, kv_heads, on) : launch<__nv_bfloat16>(a, kv_heads, on);
}
