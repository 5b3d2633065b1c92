#include "cuda/column_block.h"

#include <stdexcept>

#include "cuda/column_block.cuh"

namespace gptvq::cuda {
namespace {

template <int D, bool kDescend, bool kSigned>
void launch(const ColumnPlan& plan, const ColumnArgs& args, std::uint64_t stream) {
  const unsigned blocks = static_cast<unsigned>((args.rows + plan.tile - 1) / plan.tile);
  GPTVQ_LAUNCH((column_kernel<D, kDescend, kSigned>), dim3(blocks), dim3(static_cast<unsigned>(plan.threads)),
               static_cast<std::size_t>(plan.shared_bytes), stream, args);
}

template <bool kDescend>
void run(const Columns& c, const ColumnStrides& strides, const float* from, const float* factor, const float* roots, const float* start,
         void* index, float* result, int device, std::uint64_t stream) {
  const ColumnPlan plan = column_plan(c);
  if (c.rows == 0 || c.n == 0) return;
  const auto size = [](std::int64_t value) { return static_cast<int>(value); };
  const ColumnArgs args{size(c.rows), size(c.n), size(c.k), size(c.groups), size(c.strips), size(c.group_rows),
                        plan.tile, plan.tile_groups, plan.per, from, factor, roots, c.centroids, c.scale, start,
                        strides.from, strides.factor, strides.scale, strides.start, c.strip, index, result};
  GPTVQ_DEVICE(device);
  const auto kernel = c.is_signed ? launch<4, kDescend, true> : c.d == 1 ? launch<1, kDescend, false> :
                      c.d == 2 ? launch<2, kDescend, false> : launch<4, kDescend, false>;
  kernel(plan, args, stream);
}

}  // namespace

std::string ColumnPlan::text() const {
  return "tile " + std::to_string(tile) + " rows, " + std::to_string(tile_groups) + " row groups, " + std::to_string(per) +
         " centroids a lane, " + std::to_string(threads) + " threads, " + std::to_string(shared_bytes) + " bytes shared";
}

ColumnPlan column_plan(const Columns& c) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
  if (c.d != 1 && c.d != 2 && c.d != 4) refuse("d: got " + std::to_string(c.d) + ", need 1, 2 or 4");
  if (c.k < 1 || c.k > 256) refuse("k: got " + std::to_string(c.k) + ", need 1 to 256 centroids");
  if (c.n * c.d > kBlockCols)
    refuse("n: got a block of " + std::to_string(c.n * c.d) + " columns, need at most " + std::to_string(kBlockCols));
  constexpr std::int64_t most = std::int64_t{1} << 31;
  if (c.rows >= most - kTileRows || c.group_rows >= most || c.groups >= most || c.strips >= most / (4 * kEntries))
    refuse("rows, groups, strips: got sizes past what one launch takes");
  if (c.groups < 1 || c.strips < 1 || c.group_rows < 1 || c.groups * c.group_rows < c.rows)
    refuse("group_rows: the groups do not cover the rows");
  const int per = static_cast<int>((c.k + kTeam - 1) / kTeam);
  int tile = kTileRows, groups;
  for (;; tile /= 2) {            // a tile's codebooks lie in shared memory; two rows of two groups always fit
    const std::int64_t g = c.group_rows;
    groups = static_cast<int>(g % tile == 0 ? 1 : tile % g == 0 ? tile / g : (tile - 2) / g + 2);
    if (groups * per * kTeam <= kEntries) break;
  }
  const std::size_t bytes = c.is_signed ? sizeof(ColumnShared<4, true>) : c.d == 1 ? sizeof(ColumnShared<1, false>) :
                            c.d == 2 ? sizeof(ColumnShared<2, false>) : sizeof(ColumnShared<4, false>);
  return {tile, groups, per, kBlockCols, static_cast<int>(bytes)};
}

void column_block(const Columns& c, const ColumnStrides& strides, const float* W, const float* U, const float* roots,
                  const float* start, void* index, float* E, int device, std::uint64_t stream) {
  run<false>(c, strides, W, U, roots, start, index, E, device, stream);
}

void descent_block(const Columns& c, const ColumnStrides& strides, const float* R, const float* H, void* index,
                   float* change, int device, std::uint64_t stream) {
  run<true>(c, strides, R, H, nullptr, nullptr, index, change, device, stream);
}

}  // namespace gptvq::cuda
