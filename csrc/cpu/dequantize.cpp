#include "cpu/dequantize.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/float16.h"
#include "cpu/layout.h"

namespace gptvq {
namespace {

// Work is the type values are looked up in: Out itself, or float where a block scale is still to be applied.
template <class Fmt, class Work, class Out>
class TileDecoder {
 public:
  // out: of row `first_row` on.
  TileDecoder(const Packed& weight, const Spec& spec, Out* out, std::int64_t first_row)
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

template <class Out>
void decode_as(const Packed& weight, const Spec& s, void* out, std::int64_t first, std::int64_t last) {
  with_format(s, [&](auto format) {
    const auto decode = [&](auto decoder) {
      for (std::int64_t t = first; t < last; ++t) decoder.tile(t);
    };
    using Fmt = decltype(format);
    if (weight.sc) decode(TileDecoder<Fmt, float, Out>(weight, s, static_cast<Out*>(out), first * Spec::tile_rows));
    else decode(TileDecoder<Fmt, Out, Out>(weight, s, static_cast<Out*>(out), first * Spec::tile_rows));
  });
}

}  // namespace

void dequantize(const Packed& weight, void* out, OutType type, const Spec& s, std::int64_t first, std::int64_t last) {
  switch (type) {
    case OutType::float32: return decode_as<float>(weight, s, out, first, last);
    case OutType::float16: return decode_as<Half>(weight, s, out, first, last);
    case OutType::bfloat16: return decode_as<BFloat>(weight, s, out, first, last);
  }
}

}  // namespace gptvq
