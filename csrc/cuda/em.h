#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/quantize.h"

namespace gptvq::cuda {

// How the points of a group are shared out among the threads of a block: chosen by em_plan, and data rather than branches.
struct EmPlan {
  int rows;             // points of one column that a thread takes together; 0: one dimension, sorted
  int threads, replicas;
  bool scratch;         // the group is too large for shared memory: d = 1 needs sorted points and sums, else indices
  std::int64_t shared_bytes;

  std::string text() const;
};

// For the shared memory of `device`.  Throws std::invalid_argument where no kernel takes the points: k over 256 or sizes past 31 bits.
EmPlan em_plan(const Points& p, int device);

// All iterations of one round for d = 2 or 4 on device pointers: tried [starts, groups, k, d] in and out, loss [starts, groups]
// before the last step, or null; scratch [groups, starts, points] where the plan asks for it.  x is aligned to a vector.
void fit_round(const Points& p, float* tried, std::int64_t iterations, double* loss, std::uint8_t* scratch, int device,
               std::uint64_t stream);

// gptvq.backends.reference.fit for d = 1, all rounds: seeds [starts, groups, k] -> centroids [groups, k].  Where the plan asks for
// scratch [groups, 2, points + 1], x is ascending in each group and `weight` whole, with points of no weight at +infinity.
void fit_1d(const Points& p, const float* seeds, const std::vector<Round>& rounds, float* centroids, double* scratch, int device,
            std::uint64_t stream);

}  // namespace gptvq::cuda
