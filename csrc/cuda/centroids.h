// Codes and float centroids while solving.  All pointers are device memory; kernels are queued on `stream`.
#pragma once
#include <cstdint>

namespace gptvq::cuda {

// index [rows, n]; centroids [groups, strips, k, d] with d = 1, 2 or 4, aligned to its vectors; row r belongs to group r / group_rows.
struct Codes {
  std::int64_t rows, n, groups, strips, k, group_rows;
  const void* index;                // uint8 or, where codes have signs, int16: then k = 256, and d = 4 or f = 4 or 16
  bool is_signed;
};

// Q [rows, n d] = centroids[row group, strip[j], index] * scale; scale [rows, n] or null.  Numbers out of range take the last of theirs.
void decode(const Codes& codes, std::int64_t d, const float* centroids, const std::int64_t* strip, const float* scale, float* Q,
            int device, std::uint64_t stream);

// sums [groups, strips, k, f] of values [rows, n, f] per centroid, each added up in one order on any device.
// `order` [n] lists the columns by strip, those of strip s from bounds[s] to bounds[s + 1]; bounds [strips + 1].
// Throws std::invalid_argument where k f doubles do not fit into shared memory.
void collect(const Codes& codes, std::int64_t f, const float* values, const std::int64_t* order, const std::int64_t* bounds,
             double* sums, int device, std::uint64_t stream);

}  // namespace gptvq::cuda
