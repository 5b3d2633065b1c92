#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace gptvq {

// Calls work(part) once for every part in [0, parts) on up to `threads` threads, this one included.  Which thread runs a
// part is left open, so a part may not depend on another; then the result does not depend on the number of threads.
template <class F>
void parallel_for(std::int64_t parts, std::int64_t threads, F&& work) {
  std::atomic<std::int64_t> next{0};
  const auto run = [&] {
    for (std::int64_t part; (part = next.fetch_add(1)) < parts;) work(part);
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(std::max<std::int64_t>(0, std::min(parts, threads) - 1)));
  try {
    while (others.size() < others.capacity()) others.emplace_back(run);
  } catch (const std::system_error&) {
    // no more threads to be had: those running and this one do it all
  }
  run();
  for (std::thread& t : others) t.join();
}

}  // namespace gptvq
