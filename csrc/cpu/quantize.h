#pragma once
#include <cstdint>

namespace gptvq {

// A block of n vector columns of d weights, and the codebooks they are quantized with.  All arrays are contiguous float32.
struct Columns {
  std::int64_t rows, n, d, groups, strips, k, group_rows;
  const float* centroids;           // [groups, strips, k, d]
  const std::int64_t* strip;        // [n]
  const float* scale;               // [rows, n], or null
  bool stale = false;               // column_block: assign scaled weights as they were at the start of the block
};

// gptvq.backends.reference.column_block: W [rows, n d], U [n d, n d], roots [n, d, d] -> index [rows, n], E [rows, n d].
void column_block(const Columns& c, const float* W, const float* U, const float* roots, std::int64_t* index, float* E, int threads);

// gptvq.backends.reference.descent_block: R [rows, n d], H [n d, n d], index [rows, n] in and out -> change [rows, n d].
void descent_block(const Columns& c, const float* R, const float* H, std::int64_t* index, float* change, int threads);

// gptvq.backends.reference.em for d = 2 and 4: x [groups, points, d], metric [groups, points, d, d], centroids
// [groups, k, d] seeds in, result out.  `loss`, if not null, gets the distortion of the result [groups].
void em(const float* x, const float* metric, float* centroids, double* loss, std::int64_t groups, std::int64_t points, std::int64_t k,
        std::int64_t d, std::int64_t iterations, int threads);

// gptvq.backends.reference.decode: index [rows, n] -> Q [rows, n d].
void decode(const Columns& c, const std::int64_t* index, float* Q, int threads);

// gptvq.backends.reference.collect: values [rows, n, f] -> sums [groups, strips, k, f], double; c.centroids and c.d are not read.
void collect(const Columns& c, const std::int64_t* index, const float* values, std::int64_t f, double* sums, int threads);

}  // namespace gptvq
