// How pages of quantised keys lie in memory between the kernel that writes them and the one that scores them.
#pragma once

namespace vllm_sparse {

constexpr int kHeadSize = 128;
constexpr int kPageTokens = 32;
constexpr int kScaleGroups = 4;  // Token j of a page is of group j % 8 / 2.
constexpr int kPageBytes = kPageTokens * kHeadSize;
// Pages whose means are multiplied at once; buffers hold a multiple of them.
constexpr int kBatchPages = 32;
constexpr int kMeanBytes = kBatchPages * kHeadSize * 2;
// A page's numbers: four scales, radius, error, two spare ones that make bulk copies of any batch 16-byte pieces.
constexpr int kPageNumbers = 8;
constexpr int kRadius = 4, kError = 5;

// Byte of `byte` of row `row`, in rows of 128 bytes whose 16-byte pieces are permuted as tensor cores read them best.
__host__ __device__ constexpr int swizzled(int row, int byte) { return row * 128 + (byte ^ (row % 8 * 16)); }

}  // namespace vllm_sparse
