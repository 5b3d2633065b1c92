// The module gptvq_cuda_emu: what gptvq._C.cuda has, and the switches of the emulator.
#include "bind.h"
#include "cuda_emu.h"

namespace py = pybind11;

namespace {

void set_order(const std::string& name, std::uint64_t seed) {
  const std::map<std::string, emu::Order> orders = {{"forward", emu::Order::forward}, {"reverse", emu::Order::reverse},
                                                    {"round robin", emu::Order::round_robin}, {"random", emu::Order::random}};
  const auto found = orders.find(name);
  if (found == orders.end()) throw std::invalid_argument("order: got " + name + ", need forward, reverse, round robin or random");
  emu::options() = {found->second, seed};
}

void set_shared_memory(long bytes) { emu::shared_limit() = bytes; }

py::dict stats() {
  const emu::Stats s = emu::stats();
  emu::stats() = {};
  py::dict d;
  d["launches"] = s.launches;
  d["blocks"] = s.blocks;
  d["threads"] = s.threads;
  d["switches"] = s.switches;
  return d;
}

}  // namespace

PYBIND11_MODULE(gptvq_cuda_emu, m) {
  gptvq::bind_cuda(m);
  m.def("set_order", &set_order, py::arg("name"), py::arg("seed") = 1, "The order of threads from now on");
  m.def("set_shared_memory", &set_shared_memory, py::arg("bytes"), "What a block may have from now on");
  m.def("stats", &stats, "{launches, blocks, threads, switches} since the last call");
}
