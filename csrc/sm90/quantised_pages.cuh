// Memory layout of quantised pages, shared by the kernel that writes them and the kernel that scores them.
#pragma once

namespace vllm_sparse {

constexpr int kHeadSize = 128;
constexpr int kPageTokens = 32;
constexpr int kScaleGroups = 4;  // Key j of a page belongs to group j % 8 / 2.
constexpr int kPageBytes = kPageTokens * kHeadSize;
// Pages whose means are multiplied at once; the pages of a buffer are a multiple of this.
constexpr int kBatchPages = 32;
constexpr int kMeanBytes = kBatchPages * kHeadSize * 2;
// Numbers of a page: four scales, radius, error, and two unused ones so that bulk copies are multiples of 16 bytes.
constexpr int kPageNumbers = 8;
constexpr int kRadius = 4, kError = 5;

// Offset of byte `byte` of row `row`, in rows of 128 bytes whose 16-byte pieces are permuted as tensor cores read them.
__host__ __device__ constexpr int swizzled(int row, int byte) { return row * 128 + (byte ^ (row % 8 * 16)); }

}  // namespace vllm_sparse
