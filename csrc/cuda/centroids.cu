#include "cuda/centroids.h"

#include "cuda/centroids.cuh"

namespace gptvq::cuda {
namespace {

CodesView view(const Codes& c) {
  return {c.index, static_cast<int>(c.rows), static_cast<int>(c.n), static_cast<int>(c.groups), static_cast<int>(c.strips),
          static_cast<int>(c.k), static_cast<int>(c.group_rows)};
}

}  // namespace

void decode(const Codes& c, std::int64_t d, const float* centroids, const std::int64_t* strip, const float* scale, float* Q,
            int device, std::uint64_t stream) {
  GPTVQ_DEVICE(device);
  const std::int64_t ctas = (c.rows * c.n + kDecodeThreads - 1) / kDecodeThreads;
  if (ctas > 2147483647) throw std::invalid_argument("decode: too large a weight for one launch");
  const auto kernel = c.is_signed ? decode_kernel<4, true> : d == 1 ? decode_kernel<1, false> :
                      d == 2 ? decode_kernel<2, false> : decode_kernel<4, false>;
  GPTVQ_LAUNCH(kernel, dim3(static_cast<unsigned>(ctas)), dim3(kDecodeThreads), 0, stream, view(c), centroids, strip, scale, Q);
}

void collect(const Codes& c, std::int64_t f, const float* values, const std::int64_t* order, const std::int64_t* bounds,
             double* sums, int device, std::uint64_t stream) {
  constexpr std::int64_t most = 96 * 1024;
  const std::int64_t book_bytes = c.k * f * 8;
  if (book_bytes > most) throw std::invalid_argument("collect: the sums of a codebook do not fit into shared memory");
  GPTVQ_DEVICE(device);
  const std::int64_t points = c.group_rows * ((c.n + c.strips - 1) / c.strips);
  std::int64_t warps = 8;
  while (warps > 1 && (warps * book_bytes > most || 64 * (warps / 2) >= points)) warps /= 2;
  const auto kernel = c.is_signed ? (f == 4 ? collect_kernel<4, true> : collect_kernel<16, true>) : f == 1 ? collect_kernel<1, false> :
                      f == 2 ? collect_kernel<2, false> : f == 4 ? collect_kernel<4, false> : collect_kernel<0, false>;
  GPTVQ_LAUNCH(kernel, dim3(static_cast<unsigned>(c.groups * c.strips)), dim3(static_cast<unsigned>(32 * warps)),
               static_cast<std::size_t>(warps * book_bytes), stream, view(c), static_cast<int>(f), values, order, bounds, sums);
}

}  // namespace gptvq::cuda
