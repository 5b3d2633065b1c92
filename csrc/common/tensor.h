// Tensors and specs as Python hands them over.  No header of torch is included anywhere: gptvq._C works with any torch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace gptvq {

// A strided CPU tensor: address of its first element, torch's dtype name, shape, strides in elements.
struct TensorArg {
  std::uintptr_t address;
  std::string dtype;
  std::vector<std::int64_t> shape, strides;

  // Throws std::invalid_argument("name: got ..., need ...") unless the tensor is contiguous and exactly this.
  void require(const char* name, const char* need_dtype, std::initializer_list<std::int64_t> need_shape) const;

  template <class T>
  T* data() const { return reinterpret_cast<T*>(address); }
};

// The storage format of one [rows, cols] weight: gptvq.config.QuantSpec without the fields no kernel needs.
struct Spec {
  static constexpr std::int64_t tile_rows = 16, block_cols = 32;
  std::int64_t rows, cols, dim, index_bits, group_rows, group_cols, scale_block;

  // Throws std::invalid_argument where a field is out of range or no kernel decodes the format.
  void check() const;

  bool is_signed() const { return dim == 4 && index_bits == 3; }         // a code is the number of one of 256 centroids, and 4 signs above
  std::int64_t code_bits() const { return is_signed() ? 12 : dim == 4 ? 8 : dim * index_bits; }
  std::int64_t codewords() const { return std::int64_t{1} << std::min<std::int64_t>(code_bits(), 8); }
  const char* code_dtype() const { return is_signed() ? "int16" : "uint8"; }
  std::int64_t vectors() const { return ceil_div(cols, dim); }
  std::int64_t row_groups() const { return ceil_div(rows, group_rows); }
  std::int64_t strips() const { return ceil_div(cols, group_cols); }
  std::int64_t scale_blocks() const { return scale_block ? ceil_div(cols, scale_block) : 0; }
  std::int64_t tiles() const { return ceil_div(rows, tile_rows); }
  std::int64_t blocks() const { return ceil_div(cols, block_cols); }
  std::int64_t block_bytes() const { return tile_rows * block_cols / dim * code_bits() / 8; }

  static std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
};

}  // namespace gptvq
