#pragma once
#include <cstdint>
#include <string>

#include "cpu/quantize.h"

namespace gptvq::cuda {

// How the rows of a block of columns are shared out: chosen by column_plan, and data rather than branches.
struct ColumnPlan {
  int tile;             // rows of a thread block
  int tile_groups;      // row groups it touches at most
  int per;              // centroids that each lane of a team compares
  int threads, shared_bytes;

  std::string text() const;
};

// Throws std::invalid_argument where no kernel takes the block: n d over 128, k over 256 or sizes past 31 bits.
ColumnPlan column_plan(const Columns& c);

// Between the rows of W or R, of U or H, of the scale and of the weights at the start of the block, in elements.
struct ColumnStrides {
  std::int64_t from, factor, scale, start;
};

// gptvq.backends.reference.column_block and descent_block on device pointers, for n d <= 128.  The rows of W, U, R, H, scale and start
// are apart as given; all else is contiguous, centroids and results are aligned to a vector.  `start`, if not null, is assigned
// in the place of W, which is what `stale` means.  An index is of uint8 or, where c.is_signed, of int16.
void column_block(const Columns& c, const ColumnStrides& strides, const float* W, const float* U, const float* roots,
                  const float* start, void* index, float* E, int device, std::uint64_t stream);
void descent_block(const Columns& c, const ColumnStrides& strides, const float* R, const float* H, void* index,
                   float* change, int device, std::uint64_t stream);

}  // namespace gptvq::cuda
