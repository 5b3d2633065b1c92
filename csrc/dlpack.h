// What is used of DLPack 1 (github.com/dmlc/dlpack): a view of a tensor, and how a type of Python objects hands one out from C.
#pragma once
#include <cstdint>

namespace gptvq::dlpack {

enum : std::int32_t { cpu = 1 };                            // of Device::type
enum : std::uint8_t { floating = 2, bfloat = 4 };           // of DataType::code

struct Device {
  std::int32_t type, index;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t *shape, *strides;                            // strides in elements, null for contiguous
  std::uint64_t byte_offset;
};

// The capsule "dlpack_exchange_api" that a type has as __dlpack_c_exchange_api__.
struct Exchange {
  static constexpr std::uint32_t known_major = 1;
  std::uint32_t major, minor;
  Exchange* before;                                         // of an earlier major version, or null
  void *allocate, *managed_from_object, *managed_to_object;
  int (*view)(void* object, Tensor* out);                   // of an object that outlives it; 0, or -1 with a Python error set
  void* stream;
};

}  // namespace gptvq::dlpack
