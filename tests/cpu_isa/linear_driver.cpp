// Runs the linear kernels on cases from a file, without Python, so that it can be compiled for another processor and emulated.
//
//   linear_driver                          prints the instruction sets
//   linear_driver <set> <cases> <outputs>  cases: one after the other, each with 64-bit integers first: the 7 fields of the spec,
//                                          bias (0 or 1), activations, type, tokens, threads; then idx, cb, gs, sc, scale table,
//                                          bias and x, those that there are.  outputs: the y of each case.
//
// Every buffer ends where a page begins that may not be touched.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/linear.h"

namespace {

using gptvq::Spec;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "linear_driver: %s\n", what);
  std::exit(2);
}

class Guarded {
 public:
  explicit Guarded(std::size_t size) : size_(size) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), used = (size + page - 1) / page * page;
    total_ = used + page;
    base_ = static_cast<char*>(mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + used, page, PROT_NONE) != 0) fail("no memory");
    data_ = base_ + used - size;
  }
  Guarded(Guarded&& other) noexcept : base_(other.base_), data_(other.data_), size_(other.size_), total_(other.total_) {
    other.base_ = nullptr;
  }
  ~Guarded() {
    if (base_) munmap(base_, total_);
  }
  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  char *base_, *data_;
  std::size_t size_, total_;
};

struct File {
  std::FILE* handle;
  File(const char* path, const char* mode) : handle(std::fopen(path, mode)) {
    if (!handle) fail("cannot open a file");
  }
  ~File() { std::fclose(handle); }
};

Guarded read(const File& file, std::int64_t size) {
  Guarded buffer(static_cast<std::size_t>(size));
  if (std::fread(buffer.data(), 1, buffer.size(), file.handle) != buffer.size()) fail("a case is cut off");
  return buffer;
}

template <class T>
T* at(const Guarded& buffer) {
  return buffer.size() ? reinterpret_cast<T*>(buffer.data()) : nullptr;
}

void run(const char* instruction_set, const File& cases, const File& outputs) {
  std::int64_t head[12];
  while (std::fread(head, sizeof head, 1, cases.handle) == 1) {
    const Spec s{head[0], head[1], head[2], head[3], head[4], head[5], head[6]};
    s.check();
    const std::int64_t tokens = head[10], item = head[9] == 0 ? 4 : 2;
    const Guarded idx = read(cases, s.tiles() * s.blocks() * s.block_bytes());
    const Guarded cb = read(cases, s.row_groups() * s.strips() * s.dim * s.codewords());
    const Guarded gs = read(cases, 2 * s.row_groups() * s.strips());
    const Guarded sc = read(cases, s.tiles() * Spec::ceil_div(s.scale_blocks(), 2) * Spec::tile_rows);
    const Guarded table = read(cases, s.scale_blocks() * 16 * 4);
    const Guarded bias = read(cases, head[7] * s.rows * 4);
    const Guarded x = read(cases, tokens * s.cols * item), y(static_cast<std::size_t>(tokens * s.rows * item));
    std::memset(y.data(), 0xff, y.size());                   // NaN in all types
    const gptvq::Packed weight{at<std::uint8_t>(idx), at<std::int8_t>(cb), at<std::uint16_t>(gs), at<std::uint8_t>(sc), at<float>(table)};
    const gptvq::Linear layer(weight, s, at<float>(bias), instruction_set);
    gptvq::linear({&layer}, x.data(), static_cast<gptvq::OutType>(head[9]), tokens, {y.data()}, static_cast<gptvq::Activations>(head[8]),
                  static_cast<int>(head[11]));
    if (std::fwrite(y.data(), 1, y.size(), outputs.handle) != y.size()) fail("cannot write the outputs");
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    for (const std::string& name : gptvq::instruction_sets()) std::puts(name.c_str());
    return 0;
  }
  if (count != 4) fail("need no arguments, or an instruction set and two files");
  run(arguments[1], File(arguments[2], "rb"), File(arguments[3], "wb"));
  return 0;
}
