#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace gptvq {

// `count` uninitialized values from a cache line's start on: a vector of 64 bytes never lies across two lines.
template <class T>
class Aligned {
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<T[], Free> data_;

 public:
  explicit Aligned(std::int64_t count)
      : data_(static_cast<T*>(::operator new[](static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
  T* data() const { return data_.get(); }
  T& operator[](std::int64_t i) const { return data_[static_cast<std::size_t>(i)]; }
};

}  // namespace gptvq
