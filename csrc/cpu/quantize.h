#pragma once
#include <cstdint>
#include <vector>

namespace gptvq {

// A block of n vector columns of d weights, and the codebooks they are quantized with.  All arrays are contiguous float32, but for
// an index, which is of bytes unless it is signed.
struct Columns {
  std::int64_t rows, n, d, groups, strips, k, group_rows;
  const float* centroids;           // [groups, strips, k, d]
  const std::int64_t* strip;        // [n]
  const float* scale;               // [rows, n], or null
  bool stale = false;               // column_block: assign scaled weights as they were at the start of the block
  bool is_signed = false;           // an index is of int16: bit 8 + i of a code negates weight i of its centroid, of 256 in 4 dimensions
};

// gptvq.backends.reference.column_block: W [rows, n d], U [n d, n d], roots [n, d, d] -> index [rows, n], E [rows, n d].
void column_block(const Columns& c, const float* W, const float* U, const float* roots, void* index, float* E, int threads);

// gptvq.backends.reference.descent_block: R [rows, n d], H [n d, n d], index [rows, n] in and out -> change [rows, n d].
void descent_block(const Columns& c, const float* R, const float* H, void* index, float* change, int threads);

// gptvq.backends.reference.decode: index [rows, n] -> Q [rows, n d].
void decode(const Columns& c, const void* index, float* Q, int threads);

// gptvq.backends.reference.collect: values [rows, n, f] -> sums [groups, strips, k, f], double; c.centroids and c.d are not read.
void collect(const Columns& c, const void* index, const float* values, std::int64_t f, double* sums, int threads);

// The points of many groups that get a codebook of k centroids each.
struct Points {
  std::int64_t groups, points, d, k, starts, metrics;
  const float* x;                   // [groups, points, d]
  const float* metric;              // [metrics, d, d]; point n has the one of n % metrics
  const float* weight;              // [groups, points], times the metric
};

struct Round {
  std::int64_t iterations, keep;    // of every start still left; that many best ones stay
};

// gptvq.backends.reference.fit: seeds [starts, groups, k, d] -> centroids [groups, k, d].
void fit(const Points& p, const float* seeds, const std::vector<Round>& rounds, float* centroids, int threads);

}  // namespace gptvq
