#include "common/tensor.h"

#include <stdexcept>

namespace gptvq {
namespace {

template <class Dims>
std::string shape_text(const Dims& dims) {
  std::string text = "(";
  for (std::int64_t d : dims) text += std::to_string(d) + ", ";
  if (dims.size() > 0) text.resize(text.size() - (dims.size() > 1 ? 2 : 1));
  return text + ")";
}

bool is_contiguous(const TensorArg& t) {
  std::int64_t step = 1;
  for (std::size_t i = t.shape.size(); i-- > 0; step *= t.shape[i])
    if (t.shape[i] != 1 && t.strides[i] != step) return false;
  return true;
}

}  // namespace

void TensorArg::require(const char* name, const char* need_dtype, std::initializer_list<std::int64_t> need_shape) const {
  const std::string where(name);
  if (dtype != need_dtype || shape != std::vector<std::int64_t>(need_shape))
    throw std::invalid_argument(where + ": got " + dtype + " " + shape_text(shape) + ", need " + need_dtype + " " +
                                shape_text(need_shape));
  if (strides.size() != shape.size() || !is_contiguous(*this))
    throw std::invalid_argument(where + ": got strides " + shape_text(strides) + ", need a contiguous tensor of shape " +
                                shape_text(shape));
  if (address == 0) throw std::invalid_argument(where + ": got a tensor without storage, need one with data");
}

void Spec::check() const {
  const auto fail = [](const char* field, std::int64_t got, const char* need) {
    throw std::invalid_argument(std::string("spec.") + field + ": got " + std::to_string(got) + ", need " + need);
  };
  constexpr std::int64_t most = std::int64_t{1} << 31;   // products of two sizes stay below 2**63
  const struct { const char* name; std::int64_t value; } sizes[] = {
      {"rows", rows}, {"cols", cols}, {"group_rows", group_rows}, {"group_cols", group_cols}};
  for (const auto& size : sizes)
    if (size.value < 1 || size.value >= most) fail(size.name, size.value, "1 to 2147483647");
  if (dim != 1 && dim != 2 && dim != 4) fail("dim", dim, "1, 2 or 4");
  if (index_bits < 2 || index_bits > (dim == 4 ? 3 : 4)) fail("index_bits", index_bits, dim == 4 ? "2 or 3" : "2, 3 or 4");
  if (group_cols % dim) fail("group_cols", group_cols, "a multiple of dim");
  if (scale_block != 0 && scale_block != 16 && scale_block != 32 && scale_block != 64)
    fail("scale_block", scale_block, "0, 16, 32 or 64");
  if (scale_block != 0 && group_cols < cols && group_cols % scale_block) fail("group_cols", group_cols, "a multiple of scale_block");
}

}  // namespace gptvq
