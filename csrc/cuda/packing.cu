#include "cuda/packing.h"

#include <algorithm>
#include <type_traits>

#include "cuda/packing.cuh"

namespace gptvq::cuda {
namespace {

CodesShape codes_shape(const Spec& s) {
  return {static_cast<int>(s.rows), static_cast<int>(s.vectors()), static_cast<int>(s.blocks()), 16LL * s.tiles() * s.blocks()};
}

PackedView view(const Packed& w, const Spec& s) {
  const auto number = [](std::int64_t v) { return static_cast<int>(v); };
  return {w.idx, w.cb, w.gs, w.sc, w.scale_table, number(s.rows), number(s.cols), number(std::min(s.group_rows, s.rows)),
          number(std::min(s.group_cols, s.cols)), number(s.strips()), number(s.blocks()), number(s.scale_block),
          number(Spec::ceil_div(s.scale_blocks(), 2))};
}

unsigned grid_of(std::int64_t ctas, const char* what) {
  if (ctas > 2147483647) throw std::invalid_argument(std::string(what) + ": too large a weight for one launch");
  return static_cast<unsigned>(ctas);
}

// Groups that at most `length` rows (or columns) touch, wherever they start on a multiple of `length`.
std::int64_t touched(std::int64_t length, std::int64_t group, std::int64_t groups) {
  const std::int64_t inside = length % group == 0 ? length / group : group % length == 0 ? 1 : length / group + 2;
  return std::min(inside, groups);
}

template <int Bits, int Dim, class Out>
void launch_dequantize(const PackedView& w, Out* out, const Spec& s, std::uint64_t stream) {
  constexpr std::int64_t book_bytes = Format<Bits, Dim>::codewords * Dim, most = 48 * 1024;
  const std::int64_t groups = touched(Spec::tile_rows, s.group_rows, s.row_groups());
  std::int64_t chunk = std::min<std::int64_t>(s.blocks(), 16);
  const auto table_bytes = [&] { return groups * touched(chunk * Spec::block_cols, s.group_cols, s.strips()) * book_bytes; };
  while (chunk > 2 && table_bytes() > most) chunk /= 2;
  const bool tabled = table_bytes() <= most;
  const std::int64_t chunks = Spec::ceil_div(s.blocks(), chunk);
  const bool aligned = s.cols * static_cast<std::int64_t>(sizeof(Out)) % 16 == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
  GPTVQ_LAUNCH((dequantize_kernel<Bits, Dim, Out>), dim3(grid_of(s.tiles() * chunks, "dequantize")), dim3(32 * kDequantizeWarps),
               tabled ? static_cast<std::size_t>(table_bytes()) : 0, stream, w, out, static_cast<int>(chunks), static_cast<int>(chunk),
               tabled, aligned);
}

}  // namespace

void pack_codes(const void* codes, std::uint8_t* idx, const Spec& s, int device, std::uint64_t stream) {
  GPTVQ_DEVICE(device);
  const CodesShape shape = codes_shape(s);
  const dim3 grid(grid_of(Spec::ceil_div(shape.total, kPackThreads), "pack_codes"));
  with_format(s, [&](auto format) {
    using F = decltype(format);
    GPTVQ_LAUNCH((pack_kernel<F::bits, F::dim>), grid, dim3(kPackThreads), 0, stream, codes, idx, shape);
  });
}

void unpack_codes(const std::uint8_t* idx, void* codes, const Spec& s, int device, std::uint64_t stream) {
  GPTVQ_DEVICE(device);
  const CodesShape shape = codes_shape(s);
  const dim3 grid(grid_of(Spec::ceil_div(shape.total, kPackThreads), "unpack_codes"));
  with_format(s, [&](auto format) {
    using F = decltype(format);
    GPTVQ_LAUNCH((unpack_kernel<F::bits, F::dim>), grid, dim3(kPackThreads), 0, stream, idx, codes, shape);
  });
}

void dequantize(const Packed& weight, void* out, OutType type, const Spec& s, int device, std::uint64_t stream) {
  GPTVQ_DEVICE(device);
  const PackedView w = view(weight, s);
  with_format(s, [&](auto format) {
    using F = decltype(format);
    switch (type) {
      case OutType::float32: return launch_dequantize<F::bits, F::dim>(w, static_cast<float*>(out), s, stream);
      case OutType::float16: return launch_dequantize<F::bits, F::dim>(w, static_cast<__half*>(out), s, stream);
      case OutType::bfloat16: return launch_dequantize<F::bits, F::dim>(w, static_cast<__nv_bfloat16*>(out), s, stream);
    }
  });
}

}  // namespace gptvq::cuda
