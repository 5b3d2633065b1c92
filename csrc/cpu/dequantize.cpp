#include "cpu/dequantize.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/parallel.h"
#include "cpu/float16.h"
#include "cpu/layout.h"

namespace gptvq {
namespace {

constexpr std::int64_t kThreadedFrom = 1 << 18;   // weights; below, starting threads costs more than it saves

// Work is the type values are looked up in: Out itself, or float where a block scale is still to be applied.
template <class Fmt, class Work, class Out>
class TileDecoder {
 public:
  // out: of row `first_row` on.
  TileDecoder(const Packed& weight, const Spec& spec, Out* out, std::int64_t first_row = 0)
      : w_(weight), s_(spec), out_(out), first_row_(first_row) {
    const std::int64_t blocks = (std::min(s_.group_cols, s_.cols) + 2 * Spec::block_cols - 2) / Spec::block_cols + 1;
    codes_.resize(static_cast<std::size_t>(blocks * Fmt::vectors));
    line_.resize(static_cast<std::size_t>(blocks * Spec::block_cols));
  }

  void tile(std::int64_t tile) {
    const std::int64_t end = std::min((tile + 1) * Spec::tile_rows, s_.rows);
    for (std::int64_t row = tile * Spec::tile_rows; row < end;) {
      const std::int64_t row_group = row / s_.group_rows, row_end = std::min(end, (row_group + 1) * s_.group_rows);
      for (std::int64_t strip = 0; strip < s_.strips(); ++strip) rows_of_group(row_group, strip, row, row_end);
      row = row_end;
    }
  }

 private:
  void rows_of_group(std::int64_t row_group, std::int64_t strip, std::int64_t row, std::int64_t row_end) {
    const std::int64_t col = strip * s_.group_cols, width = std::min(s_.group_cols, s_.cols - col);
    const std::int64_t group = row_group * s_.strips() + strip;
    const std::int8_t* cb = w_.cb + group * Fmt::dim * Fmt::codewords;
    const float gs = to_float(BFloat{w_.gs[group]});
    const bool tabled = (row_end - row) * width >= Fmt::dim * Fmt::codewords;
    if (tabled)
      for (int k = 0; k < Fmt::codewords; ++k)
        for (int d = 0; d < Fmt::dim; ++d) table_[k][d] = value(cb, gs, k, d);
    for (; row < row_end; ++row) {
      const auto* code = codes_of(row, col, width);
      const std::int64_t vectors = Spec::ceil_div(width, Fmt::dim);
      Work* line = line_.data();
      if (tabled)
        for (std::int64_t v = 0; v < vectors; ++v) std::memcpy(line + v * Fmt::dim, table_[Fmt::number(code[v])], sizeof table_[0]);
      else
        for (std::int64_t v = 0; v < vectors; ++v)
          for (int d = 0; d < Fmt::dim; ++d) line[v * Fmt::dim + d] = value(cb, gs, Fmt::number(code[v]), d);
      if constexpr (Fmt::has_signs)
        for (std::int64_t v = 0; v < vectors; ++v)
          for (int d = 0; d < Fmt::dim; ++d) flip_sign(line[v * Fmt::dim + d], Fmt::sign_bits(code[v]) >> d & 1);
      store(row, col, width);
    }
  }

  // The sign is the top bit in all three types.
  static void flip_sign(Work& value, int flip) {
    using Bits = std::conditional_t<sizeof(Work) == 4, std::uint32_t, std::uint16_t>;
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = static_cast<Bits>(bits ^ static_cast<Bits>(flip) << (8 * sizeof(Work) - 1));
    std::memcpy(&value, &bits, sizeof bits);
  }

  static Work value(const std::int8_t* cb, float gs, int k, int d) {
    return round_to<Work>(static_cast<float>(cb[d * Fmt::codewords + k]) * gs);
  }

  // Codes of columns col.. of a row, valid until the next call.
  const typename Fmt::Code* codes_of(std::int64_t row, std::int64_t col, std::int64_t width) {
    const std::int64_t first = col / Spec::block_cols, last = (col + width - 1) / Spec::block_cols;
    const std::uint8_t* tile = w_.idx + row / Spec::tile_rows * s_.blocks() * s_.block_bytes();
    for (std::int64_t b = first; b <= last; ++b)
      Fmt::decode_row(tile + b * s_.block_bytes(), static_cast<int>(row % Spec::tile_rows),
                      codes_.data() + (b - first) * Fmt::vectors);
    return codes_.data() + col % Spec::block_cols / Fmt::dim;
  }

  void store(std::int64_t row, std::int64_t col, std::int64_t width) {
    Out* out = out_ + (row - first_row_) * s_.cols + col;
    const Work* line = line_.data();
    if (!w_.sc) {
      for (std::int64_t i = 0; i < width; ++i) out[i] = convert(line[i]);
      return;
    }
    const std::uint8_t* sc = w_.sc + row / Spec::tile_rows * Spec::ceil_div(s_.scale_blocks(), 2) * Spec::tile_rows
                             + row % Spec::tile_rows;
    for (std::int64_t i = 0; i < width;) {
      const std::int64_t block = (col + i) / s_.scale_block, end = std::min(width, (block + 1) * s_.scale_block - col);
      const int code = sc[block / 2 * Spec::tile_rows] >> 4 * (block % 2) & 15;
      const float scale = w_.scale_table[block * 16 + code];
      for (; i < end; ++i) out[i] = scaled(line[i], scale);
    }
  }

  static Out convert(Work value) {
    if constexpr (std::is_same_v<Work, Out>) return value;
    else return round_to<Out>(value);
  }

  static Out scaled(Work value, float scale) {
    if constexpr (std::is_same_v<Work, float>) return round_to<Out>(value * scale);
    else return value;            // never taken: with block scales Work is float
  }

  const Packed& w_;
  const Spec& s_;
  Out* out_;
  std::int64_t first_row_;
  Work table_[Fmt::codewords][Fmt::dim];
  std::vector<typename Fmt::Code> codes_;
  std::vector<Work> line_;
};

template <class Fmt, class Work, class Out>
void decode_tiles(const Packed& weight, const Spec& s, Out* out, int threads) {
  const std::int64_t parts = s.rows * s.cols < kThreadedFrom ? 1 : std::clamp<std::int64_t>(threads, 1, s.tiles());
  std::vector<TileDecoder<Fmt, Work, Out>> decoders(static_cast<std::size_t>(parts), TileDecoder<Fmt, Work, Out>(weight, s, out));
  parallel_for(parts, parts, [&](std::int64_t p) {
    for (std::int64_t t = s.tiles() * p / parts; t < s.tiles() * (p + 1) / parts; ++t)
      decoders[static_cast<std::size_t>(p)].tile(t);
  });
}

template <class Out>
void decode_as(const Packed& weight, const Spec& s, void* out, int threads) {
  with_format(s, [&](auto format) {
    using Fmt = decltype(format);
    if (weight.sc) decode_tiles<Fmt, float>(weight, s, static_cast<Out*>(out), threads);
    else decode_tiles<Fmt, Out>(weight, s, static_cast<Out*>(out), threads);
  });
}

}  // namespace

void dequantize(const Packed& weight, void* out, OutType type, const Spec& s, int threads) {
  switch (type) {
    case OutType::float32: return decode_as<float>(weight, s, out, threads);
    case OutType::float16: return decode_as<Half>(weight, s, out, threads);
    case OutType::bfloat16: return decode_as<BFloat>(weight, s, out, threads);
  }
}

void dequantize_tile(const Packed& weight, float* out, const Spec& s, std::int64_t tile) {
  with_format(s, [&](auto format) { TileDecoder<decltype(format), float, float>(weight, s, out, tile * Spec::tile_rows).tile(tile); });
}

}  // namespace gptvq
