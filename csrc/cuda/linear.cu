#include "cuda/linear.h"

#include <algorithm>
#include <string>

#include "cuda/linear_exact.cuh"
#include "cuda/linear_launch.h"

namespace gptvq::cuda {
namespace {

constexpr std::int64_t kAlign = 256;        // of the parts of the scratch memory
constexpr std::int64_t kCtasPerProcessor = 2;

std::int64_t padded(std::int64_t bytes) { return Spec::ceil_div(bytes, kAlign) * kAlign; }

// Warps of a CTA for `work` pieces, so that all have nearly as many.
int warps_for(std::int64_t work, int most) { return static_cast<int>(Spec::ceil_div(work, Spec::ceil_div(work, most))); }

bool by_group(const Spec& s) { return s.codewords() == 256; }

LinearLayer layer_of(const Linear& layer, void* y, int most_warps) {
  const Spec& s = layer.spec();
  const Packed& p = layer.weight();
  LinearLayer w{};
  w.idx = p.idx, w.cb = p.cb, w.gs = p.gs, w.sc = p.sc, w.scale_table = p.scale_table, w.bias = layer.bias(), w.y = y;
  w.rows = static_cast<int>(s.rows);
  w.tiles = static_cast<int>(s.tiles());
  w.blocks = static_cast<int>(s.blocks());
  w.row_groups = static_cast<int>(s.row_groups());
  w.group_rows = static_cast<int>(s.group_rows);
  w.group_tiles = s.row_groups() == 1 ? w.tiles : static_cast<int>(Spec::ceil_div(s.group_rows, Spec::tile_rows));
  w.strips = static_cast<int>(s.strips());
  w.strip_blocks = s.strips() == 1 ? w.blocks : static_cast<int>(s.group_cols / Spec::block_cols);
  w.strip_chunks = static_cast<int>(Spec::ceil_div(w.strip_blocks, kChunk / Spec::block_cols));
  w.chunks = (w.strips - 1) * w.strip_chunks +
             static_cast<int>(Spec::ceil_div(w.blocks - (w.strips - 1) * w.strip_blocks, kChunk / Spec::block_cols));
  if (s.scale_block) {
    w.scale_blocks = static_cast<int>(s.scale_blocks());
    w.scale_pairs = static_cast<int>(Spec::ceil_div(s.scale_blocks(), 2));
    w.scale_shift = s.scale_block == 64 ? 6 : s.scale_block == 32 ? 5 : 4;
  }
  w.warps = warps_for(by_group(s) ? w.group_tiles : w.chunks, most_warps);
  w.turn = by_group(s) ? 1 : w.warps;
  w.turn_strips = w.turn / w.strip_chunks;
  w.turn_subs = w.turn % w.strip_chunks;
  return w;
}

int grain_of(const Spec& s) { return s.scale_block == 0 ? 256 : s.scale_block == 64 ? 64 : 16; }

// The layers [first, last) of one launch: of one format, cut into the same chunks.
struct Launch {
  std::size_t first, last;
  LinearBatch batch{};
  int warps = 1, ctas = 0, grain;
  bool splits = false;
  std::int64_t step_at = 0, partial_at = 0, bytes = 0;      // in the scratch memory

  Launch(const std::vector<const Linear*>& layers, const std::vector<void*>& y, std::size_t from, std::int64_t tokens,
         Arithmetic arithmetic, int device)
      : first(from), last(from), grain(grain_of(layers[from]->spec())) {
    const Spec& s = layers[from]->spec();
    const bool half = arithmetic == Arithmetic::fp16;
    const bool several = half || (tokens > 1 && grain != 16);         // block scales of 16 or 32 columns: one token at a time
    int cta_tiles = 1;
    if (several && !half)
      with_format(s, [&](auto format) { cta_tiles = tiles_per_cta<decltype(format)::bits, decltype(format)::dim>(grain); });
    const auto parts_of = [&](const LinearLayer& w) {
      return by_group(s) ? w.row_groups * Spec::ceil_div(w.group_tiles, w.warps) : Spec::ceil_div(w.tiles, cta_tiles);
    };
    const std::int64_t wanted = kCtasPerProcessor * multiprocessors(device);
    for (; last < layers.size() && last - first < kMostLayers && joins(s, *layers[last]); ++last) {
      LinearLayer& w = batch.layer[last - first];
      w = layer_of(*layers[last], y.empty() ? nullptr : y[last], several ? kTokensWarps : kLinearWarps);
      w.first_row = batch.total_rows;
      batch.total_rows += w.rows;
      warps = std::max(warps, w.warps);
      // By the layer alone, so that its sums do not depend on what else is launched.
      const std::int64_t share = w.chunks * parts_of(w) / wanted;
      w.splits = by_group(s) ? static_cast<int>(Spec::ceil_div(w.chunks, std::max<std::int64_t>(1, share))) : 1;
      w.first_cta = ctas;
      ctas += static_cast<int>(parts_of(w)) * w.splits;
      splits |= w.splits > 1;
    }
    batch.layers = static_cast<int>(last - first);
    batch.tokens = static_cast<int>(tokens);
    batch.block_bytes = static_cast<int>(s.block_bytes());
    batch.book_bytes = static_cast<int>(s.codewords() * s.dim);
    batch.x_bytes = 2 * kChunk;
    batch.step_bytes = kChunk / grain * 4;
    batch.gs_bytes = 2;
    batch.two_to_16 = 1 << 16;
    const std::int64_t chunks = tokens * batch.layer[0].chunks;
    step_at = padded(chunks * batch.x_bytes);
    partial_at = step_at + padded(chunks * batch.step_bytes);
    bytes = partial_at;
    for (int l = 0; l < batch.layers; ++l) bytes += partial_bytes(batch.layer[l]);
  }

  std::int64_t partial_bytes(const LinearLayer& w) const { return w.splits > 1 ? padded(4LL * w.splits * batch.tokens * w.rows) : 0; }

  static bool joins(const Spec& s, const Linear& other) {
    const Spec& o = other.spec();
    return other.fast() && s.dim == o.dim && s.index_bits == o.index_bits && s.scale_block == o.scale_block &&
           (s.group_cols == o.group_cols || (s.strips() == 1 && o.strips() == 1));
  }
};

void launch_exact(const Linear& layer, const void* x, int type, std::int64_t tokens, void* y, std::uint64_t stream) {
  const Spec& s = layer.spec();
  const Packed& p = layer.weight();
  ExactArgs args{p.idx, p.cb, p.gs, p.sc, p.scale_table, layer.bias(), x, y};
  args.rows = static_cast<int>(s.rows), args.cols = static_cast<int>(s.cols), args.blocks = static_cast<int>(s.blocks());
  args.strips = static_cast<int>(s.strips());
  args.group_rows = static_cast<int>(s.group_rows), args.group_cols = static_cast<int>(s.group_cols);
  args.scale_block = static_cast<int>(s.scale_block), args.scale_pairs = static_cast<int>(Spec::ceil_div(s.scale_blocks(), 2));
  args.tokens = static_cast<int>(tokens), args.type = type;
  const dim3 grid(static_cast<unsigned>(Spec::ceil_div(s.rows, kExactWarps)), static_cast<unsigned>(Spec::ceil_div(tokens, kExactTokens)));
  with_format(s, [&](auto format) {
    GPTVQ_LAUNCH((linear_exact_kernel<decltype(format)::bits, decltype(format)::dim>), grid, dim3(32 * kExactWarps), 0, stream, args);
  });
}

bool fast(const Linear& layer, Arithmetic arithmetic) { return arithmetic != Arithmetic::fp32 && layer.fast(); }

// f(launch) for each launch of the fast kernels, exact(layer) for each layer that they do not take, in order.
template <class F, class G>
void for_each_launch(const std::vector<const Linear*>& layers, const std::vector<void*>& y, std::int64_t tokens, Arithmetic arithmetic,
                     int device, F f, G exact) {
  for (std::size_t i = 0; i < layers.size();) {
    if (!fast(*layers[i], arithmetic)) {
      exact(i++);
      continue;
    }
    const Launch launch(layers, y, i, tokens, arithmetic, device);
    f(launch);
    i = launch.last;
  }
}

void check_alignment(const char* name, const void* at) {
  if (reinterpret_cast<std::uintptr_t>(at) % 16)
    throw std::invalid_argument(std::string(name) + ": got an address that is not a multiple of 16, need one that is");
}

}  // namespace

Linear::Linear(const Packed& weight, const Spec& spec, const float* bias) : weight_(weight), spec_(spec), bias_(bias) {
  check_alignment("idx", weight.idx);
  check_alignment("cb", weight.cb);
  check_alignment("gs", weight.gs);
  check_alignment("sc", weight.sc);
  check_alignment("scale table", weight.scale_table);
  const bool whole_strips = spec.group_cols % Spec::block_cols == 0 || spec.strips() == 1;
  const bool one_book = spec.group_rows % Spec::tile_rows == 0 || spec.row_groups() == 1;
  fast_ = whole_strips && (one_book || (spec.codewords() <= 16 && (spec.dim == 1 || spec.group_rows % 2 == 0)));
}

std::int64_t linear_scratch(const std::vector<const Linear*>& layers, std::int64_t tokens, Arithmetic arithmetic, int device) {
  std::int64_t bytes = 0;
  for_each_launch(layers, {}, tokens, arithmetic, device, [&](const Launch& l) { bytes = std::max(bytes, l.bytes); }, [](std::size_t) {});
  return bytes;
}

void linear(const std::vector<const Linear*>& layers, const void* x, OutType type, std::int64_t tokens, const std::vector<void*>& y,
            Arithmetic arithmetic, void* scratch, int device, std::uint64_t stream) {
  if (tokens == 0) return;
  if (tokens > kMostTokens)
    throw std::invalid_argument("tokens: got " + std::to_string(tokens) + ", need at most " + std::to_string(kMostTokens));
  GPTVQ_DEVICE(device);
  for_each_launch(
      layers, y, tokens, arithmetic, device,
      [&](Launch launch) {
        LinearBatch& b = launch.batch;
        const Spec& s = layers[launch.first]->spec();
        char* memory = static_cast<char*>(scratch);
        const int limit = arithmetic == Arithmetic::a8 ? 127 : 254 * 127 + 126;
        b.type = static_cast<int>(type);
        b.high_weight = arithmetic == Arithmetic::a8 ? 1 : 254;
        b.x = reinterpret_cast<std::int8_t*>(memory);
        b.step = reinterpret_cast<float*>(memory + launch.step_at);
        std::int64_t at = launch.partial_at;
        for (int l = 0; l < b.layers; ++l) {
          b.layer[l].partial = reinterpret_cast<float*>(memory + at);
          at += launch.partial_bytes(b.layer[l]);
        }
        const Inputs in{x, reinterpret_cast<std::int8_t*>(memory), reinterpret_cast<float*>(memory + launch.step_at), b.tokens, b.type,
                        static_cast<int>(s.cols), limit, s.scale_block ? static_cast<int>(s.scale_block) : kChunk};
        with_format(s, [&](auto format) {
          using F = decltype(format);
          const LinearLaunch of{in, b, launch.ctas, launch.warps, stream};
          if (arithmetic == Arithmetic::fp16) launch_half<F::bits, F::dim>(of);
          else launch_linear<F::bits, F::dim>(of, launch.grain);
        });
        if (launch.splits) {
          const dim3 grid(static_cast<unsigned>(Spec::ceil_div(b.total_rows, kSumThreads)), static_cast<unsigned>(tokens));
          GPTVQ_LAUNCH(linear_sum_kernel, grid, dim3(kSumThreads), 0, stream, b);
        }
      },
      [&](std::size_t i) { launch_exact(*layers[i], x, static_cast<int>(type), tokens, y[i], stream); });
}

}  // namespace gptvq::cuda
