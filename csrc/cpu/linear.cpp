#include "cpu/linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/parallel.h"
#include "cpu/amx.h"
#include "cpu/float16.h"
#include "cpu/linear_exact.h"

namespace gptvq {
namespace {

constexpr std::int64_t kBlock = Spec::block_cols, kTile = Spec::tile_rows;
constexpr std::int64_t kWidestSpan = 8;                 // blocks that share an activation step where no block scale cuts them
constexpr std::int64_t kBytesPerPart = 48 << 10;        // of indices and tokens, measured: less is not worth another thread
constexpr std::int64_t kThreadedFrom = 1 << 18;         // weights to unpack; below, starting threads costs more than it saves
constexpr std::int64_t kFewTokens = 8;                  // calls of so many are brief
constexpr std::int64_t kFewForTiles = 4;                // tokens; fewer are never multiplied by tiles

struct InstructionSet {
  const char* name;
  LinearKernels kernels, many;
  bool supported;
};

const std::vector<InstructionSet>& known() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#if defined(GPTVQ_AVX512)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
                        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("fma");
#if defined(GPTVQ_AMX)
    found.push_back({"amx", linear_avx512, linear_amx, avx512 && has_tiles(Tiles::int8)});
#endif
    found.push_back({"avx512", linear_avx512, linear_avx512, avx512});
#endif
#if defined(GPTVQ_AVX2)
    __builtin_cpu_init();
    found.push_back({"avx2", linear_avx2, linear_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#if defined(GPTVQ_NEON)
    found.push_back({"neon", linear_neon, linear_neon, neon_dotprod()});
#endif
    found.push_back({"scalar", linear_scalar, linear_scalar, true});
    return found;
  }();
  return sets;
}

const InstructionSet& set_of(const std::string& name) {
  std::string names;
  for (const InstructionSet& set : known()) {
    if (!set.supported) continue;
    if (name.empty() || name == set.name) return set;
    names += std::string(names.empty() ? "" : ", ") + set.name;
  }
  throw std::invalid_argument("instruction set: got " + name + ", this processor and build have " + names);
}

void to_floats(const void* x, OutType type, std::int64_t count, float* out) {
  if (type == OutType::float32) {
    std::memcpy(out, x, static_cast<std::size_t>(count) * sizeof(float));
  } else if (type == OutType::bfloat16) {
    const auto* from = static_cast<const std::uint16_t*>(x);
    for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(BFloat{from[i]});
  } else {
    const auto* from = static_cast<const std::uint16_t*>(x);
    for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(Half{from[i]});
  }
}

// Memory that grows and is kept by its thread, so that a call of a small layer allocates nothing.
struct Scratch {
  std::vector<std::int8_t> bytes;
  std::vector<float> floats;
  std::vector<LinearSpan> spans;
};

Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}

template <class T>
T* at_least(std::vector<T>& data, std::int64_t count) {
  if (static_cast<std::int64_t>(data.size()) < count) data.resize(static_cast<std::size_t>(count));
  return data.data();
}

// The first cache line from `data` on.
template <class T>
T* aligned(T* data) {
  return data + (64 - reinterpret_cast<std::uintptr_t>(data) % 64) % 64 / sizeof(T);
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : known())
    if (set.supported) names.emplace_back(set.name);
  return names;
}

Linear::Linear(const Packed& weight, const Spec& spec, const float* bias, const std::string& instruction_set)
    : weight_(weight), spec_(spec), bias_(bias) {
  const InstructionSet& set = set_of(instruction_set);
  const bool one_book = spec.group_rows % kTile == 0 || spec.row_groups() == 1;
  const bool small_groups = kTile % spec.group_rows == 0 && std::max<std::int64_t>(1, 4 / spec.group_rows) * spec.codewords() <= 16;
  const bool whole_strips = spec.group_cols % kBlock == 0 || spec.strips() == 1;
  if (!whole_strips || !(one_book || small_groups)) return;
  kernels_ = set.kernels;
  many_ = set.many;

  // Measured: what a span costs beside its products is as much for 16 columns as for 64.
  const std::int64_t span_cols = spec.scale_block ? spec.scale_block : std::min(spec.group_cols, spec.cols);
  many_from_ = span_cols <= 16 ? 4 * kFewForTiles : span_cols <= 32 ? 2 * kFewForTiles : kFewForTiles;

  LinearArgs& a = args_;
  a.idx = weight.idx;
  a.cb = weight.cb;
  a.sc = weight.sc;
  a.scale_table = weight.scale_table;
  a.rows = spec.rows;
  a.blocks = spec.blocks();
  a.row_groups = spec.row_groups();
  a.strips = spec.strips();
  a.group_rows = one_book && spec.row_groups() == 1 ? spec.tiles() * kTile : spec.group_rows;
  a.scale_block = spec.scale_block;
  a.scale_blocks = spec.scale_blocks();
  a.strip_blocks = spec.strips() == 1 ? a.blocks : spec.group_cols / kBlock;
  a.groups_per_tile = one_book ? 1 : kTile / spec.group_rows;
  a.span_blocks = spec.scale_block ? std::max<std::int64_t>(1, spec.scale_block / kBlock) : kWidestSpan;
  const std::int64_t halves = spec.scale_block == 16 ? 2 : 1;
  for (std::int64_t first = 0; first < a.blocks; first += a.strip_blocks)
    a.spans += halves * Spec::ceil_div(std::min(a.strip_blocks, a.blocks - first), a.span_blocks);
  a.bias = bias;
  for (std::int64_t r = 0; r < kTile; ++r) {
    a.row_group[r] = static_cast<std::uint8_t>(one_book ? 0 : r / spec.group_rows);
    a.lane_offset[r] = static_cast<std::uint8_t>(one_book || spec.group_rows >= 4 ? 0 : r / 4 / spec.group_rows * spec.codewords());
  }
  const std::int64_t slots = spec.codewords() <= 16 ? 16 / spec.codewords() : 1;     // per 4 rows
  for (std::int64_t s = 0; s < 4 * slots; ++s)
    a.slot_group[s] = a.row_group[std::min<std::int64_t>(kTile - 1, s / slots * 4 + std::min<std::int64_t>(3, s % slots * spec.group_rows))];
  // [row groups, strips] -> [tiles, strips, groups per tile], so that a tile's scales lie side by side.
  gs_.assign(static_cast<std::size_t>(spec.tiles() * a.strips * a.groups_per_tile + kTile), 0);
  for (std::int64_t tile = 0; tile < spec.tiles(); ++tile)
    for (std::int64_t strip = 0; strip < a.strips; ++strip)
      for (std::int64_t g = 0; g < a.groups_per_tile; ++g) {
        const std::int64_t group = std::min(a.row_groups - 1, tile * kTile / a.group_rows + g);
        gs_[static_cast<std::size_t>((tile * a.strips + strip) * a.groups_per_tile + g)] = weight.gs[group * a.strips + strip];
      }
  a.gs = gs_.data();
}

void Linear::unpack(std::int64_t first, std::int64_t last, void* out, OutType type, int threads) const {
  const auto kernel = fast() ? kernels_(static_cast<int>(spec_.code_bits()), static_cast<int>(spec_.dim), 2, args_.groups_per_tile == 1,
                                        spec_.scale_block == 16).unpack : nullptr;
  const std::int64_t tiles = last - first, line = kTile * spec_.cols * (type == OutType::float32 ? 4 : 2);
  const std::int64_t parts = tiles * kTile * spec_.cols < kThreadedFrom ? 1 : std::clamp<std::int64_t>(threads, 1, tiles);
  parallel_for(parts, parts, [&](std::int64_t p) {
    const std::int64_t from = first + tiles * p / parts, to = first + tiles * (p + 1) / parts;
    void* rows = static_cast<char*>(out) + (from - first) * line;
    if (!kernel) return dequantize(weight_, rows, type, spec_, from, to);
    LinearArgs a = args_;
    a.y = rows;
    a.y_stride = spec_.cols;
    a.type = static_cast<int>(type);
    kernel(a, from, to);
  });
}

// One call: the activations as integers once for all layers that want the same ones, then all tiles of all layers.
struct LinearRun {
  const std::vector<const Linear*>& layers;
  const void* x;
  OutType type;
  std::int64_t tokens;
  const std::vector<void*>& y;
  Activations activations;
  int planes, threads;

  LinearKernel kernel_of(const Linear& l) const {
    return (tokens < l.many_from_ ? l.kernels_ : l.many_)(static_cast<int>(l.spec_.code_bits()), static_cast<int>(l.spec_.dim), planes,
                                                   l.args_.groups_per_tile == 1, l.spec_.scale_block == 16);
  }

  void operator()() {
    for (std::size_t first = 0; first < layers.size();) {
      std::size_t last = first + 1;
      if (!integers(*layers[first])) {
        exact(first);
      } else {
        while (last < layers.size() && integers(*layers[last]) && same_activations(*layers[first], *layers[last])) ++last;
        some(first, last);
      }
      first = last;
    }
  }

  // Whether one makes of x what the other reads: in the same order, with the same spans.
  bool same_activations(const Linear& l, const Linear& m) const {
    const LinearArgs &a = l.args_, &b = m.args_;
    return kernel_of(l).quantize == kernel_of(m).quantize && a.spans == b.spans && a.strip_blocks == b.strip_blocks &&
           a.span_blocks == b.span_blocks && a.scale_block == b.scale_block;
  }

  bool integers(const Linear& layer) const { return activations != Activations::fp32 && layer.fast(); }

  void some(std::size_t first, std::size_t last) {
    const Spec& spec = layers[first]->spec_;
    LinearArgs shared = layers[first]->args_;
    const std::int64_t width = shared.blocks * kBlock;
    Scratch& memory = scratch();
    shared.tokens = tokens;
    const std::int64_t room = tokens < kFewForTiles ? tokens * width : Spec::ceil_div(tokens, 16) * 16 * (Spec::ceil_div(width, 64) * 64);
    shared.hi = aligned(at_least(memory.bytes, 2 * room + 64));
    shared.lo = shared.hi + tokens * width;
    shared.span = at_least(memory.spans, tokens * shared.spans);
    float* rows = at_least(memory.floats, tokens * (width + shared.spans));
    shared.step = rows + tokens * width;
    const LinearKernel kernel = kernel_of(*layers[first]);
    const std::int64_t item = type == OutType::float32 ? 4 : 2;
    parallel_for(tokens, tokens * width < 1 << 15 ? 1 : threads, [&](std::int64_t token) {
      float* row = rows + token * width;
      to_floats(static_cast<const char*>(x) + token * spec.cols * item, type, spec.cols, row);
      std::fill(row + spec.cols, row + width, 0.f);
      kernel.quantize(shared, row, token);
    });

    struct Part { std::size_t layer; std::int64_t first, last; };
    std::int64_t work = 0;
    for (std::size_t l = first; l < last; ++l) work += layers[l]->spec_.tiles() * layers[l]->spec_.blocks() * layers[l]->spec_.block_bytes();
    const std::int64_t useful = std::clamp<std::int64_t>(work * tokens / kBytesPerPart, 1, threads);
    std::vector<Part> parts;
    for (std::size_t l = first; l < last; ++l) {
      const std::int64_t tiles = layers[l]->spec_.tiles();
      // A few parts per thread even out their speeds; pairs of tiles share the loads of activations.
      const std::int64_t size = useful == 1 ? tiles : std::max<std::int64_t>(2, tiles / (useful * 4) / 2 * 2);
      for (std::int64_t t = 0; t < tiles; t += size) parts.push_back({l, t, std::min(tiles, t + size)});
    }
    parallel_for(static_cast<std::int64_t>(parts.size()), useful, [&](std::int64_t p) {
      const Part& part = parts[static_cast<std::size_t>(p)];
      const Linear& layer = *layers[part.layer];
      LinearArgs a = layer.args_;
      a.tokens = tokens, a.hi = shared.hi, a.lo = shared.lo, a.span = shared.span, a.step = shared.step;
      a.y = y[part.layer];
      a.y_stride = a.rows;
      a.type = static_cast<int>(type);
      static thread_local std::vector<float> sums;
      float* start = aligned(at_least(sums, linear_scratch(tokens) + 16));
      kernel_of(layer).tiles(a, part.first, part.last, start);
    }, tokens <= kFewTokens);
  }

  void exact(std::size_t l) {
    const std::int64_t cols = layers[l]->spec_.cols;
    float* rows = at_least(scratch().floats, tokens * cols);
    to_floats(x, type, tokens * cols, rows);
    linear_exact(layers[l]->weight_, layers[l]->spec_, layers[l]->bias_, rows, tokens, y[l], type, threads);
  }
};

void linear(const std::vector<const Linear*>& layers, const void* x, OutType type, std::int64_t tokens, const std::vector<void*>& y,
            Activations activations, int threads) {
  if (tokens == 0) return;
  LinearRun{layers, x, type, tokens, y, activations, activations == Activations::a8 ? 1 : 2, std::max(1, threads)}();
}

}  // namespace gptvq
