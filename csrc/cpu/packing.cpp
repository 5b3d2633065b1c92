#include "cpu/packing.h"

#include <algorithm>
#include <cstring>

#include "cpu/layout.h"

namespace gptvq {
namespace {

// Calls f(row, first vector, count, block, row in its tile) for every row of every block that holds codes.
template <class Fmt, class Byte, class F>
void for_each_row(Byte* idx, const Spec& s, F&& f) {
  for (std::int64_t row = 0; row < s.rows; ++row) {
    Byte* tile = idx + row / Spec::tile_rows * s.blocks() * s.block_bytes();
    for (std::int64_t b = 0; b < s.blocks(); ++b) {
      const std::int64_t first = b * Fmt::vectors, count = std::min<std::int64_t>(Fmt::vectors, s.vectors() - first);
      f(row, first, count, tile + b * s.block_bytes(), static_cast<int>(row % Spec::tile_rows));
    }
  }
}

}  // namespace

void pack_codes(const void* codes, std::uint8_t* idx, const Spec& s) {
  std::memset(idx, 0, static_cast<std::size_t>(s.tiles() * s.blocks() * s.block_bytes()));
  with_format(s, [&](auto format) {
    using Fmt = decltype(format);
    const auto* from = static_cast<const typename Fmt::Code*>(codes);
    const int largest = *std::max_element(from, from + s.rows * s.vectors());
    if (largest >= 1 << Fmt::bits)
      throw std::invalid_argument("codes: got " + std::to_string(largest) + ", need values below " + std::to_string(1 << Fmt::bits));
    for_each_row<Fmt>(idx, s, [&](std::int64_t row, std::int64_t first, std::int64_t count, std::uint8_t* block, int r) {
      typename Fmt::Code padded[Fmt::vectors] = {};
      std::copy_n(from + row * s.vectors() + first, count, padded);
      Fmt::encode_row(padded, r, block);
    });
  });
}

void unpack_codes(const std::uint8_t* idx, void* codes, const Spec& s) {
  with_format(s, [&](auto format) {
    using Fmt = decltype(format);
    for_each_row<Fmt>(idx, s, [&](std::int64_t row, std::int64_t first, std::int64_t count, const std::uint8_t* block, int r) {
      typename Fmt::Code padded[Fmt::vectors];
      Fmt::decode_row(block, r, padded);
      std::copy_n(padded, count, static_cast<typename Fmt::Code*>(codes) + row * s.vectors() + first);
    });
  });
}

}  // namespace gptvq
