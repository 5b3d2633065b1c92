// The baseline kernel of equal care: 4-bit integers, one fp16 scale per row and 32 columns, in the tiles of this package; AVX-512 VNNI.
//
// Weight [rows, cols], padded to tiles of 16 rows and pairs of blocks (2 x 32 columns).  A pair is 576 bytes, so that a tile is one
// stream of whole cache lines: 2 x 4 planes of 64 bytes, then 2 x 16 fp16 scales.  In plane p of a block, byte 4r + j holds columns
// 8p + j (low nibble) and 8p + 4 + j (high nibble) of row r.  w = scale * (nibble - 8).
//
// One int32 lane is one row.  Activations are int8 per 32 columns (a8), or 256 high + low with both int8 (a16).
// The high nibble is multiplied in place, as 16 q: its sum is shifted down once per block instead of every byte.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr long kTileRows = 16, kBlockCols = 32, kPairBytes = 2 * 256 + 2 * 32, kPrefetch = 4 * kPairBytes;
constexpr long kFarAhead = 16384, kAhead = 2048;          // as the kernels of this package

// ---- threads that wait for work: they spin for some 20 us, then sleep
class Pool {
 public:
  explicit Pool(int threads) {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
  }

  ~Pool() {
    stop_ = true;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // part(t) for t = 0 .. threads - 1, the first by the caller; returns when all are done.
  void run(const std::function<void(int)>& part) {
    part_ = &part;
    left_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();  // costs no system call while nobody sleeps
    part(0);
    for (int left = left_.load(std::memory_order_acquire); left > 0; left = left_.load(std::memory_order_acquire)) {
      if (!spin([&] { return left_.load(std::memory_order_acquire) != left; })) left_.wait(left);
    }
  }

 private:
  void work(int t) {
    for (int seen = 0;; ++seen) {
      if (!spin([&] { return epoch_.load(std::memory_order_acquire) != seen; })) epoch_.wait(seen);
      if (stop_) return;
      (*part_)(t);
      left_.fetch_sub(1, std::memory_order_release);
      left_.notify_one();
    }
  }

  // Some 20 us at most; whether `done` came true.
  template <class Done>
  static bool spin(const Done& done) {
    for (int i = 0; i < 2000; ++i) {
      if (done()) return true;
      _mm_pause();
    }
    return done();
  }

  std::vector<std::thread> workers_;
  const std::function<void(int)>* part_ = nullptr;
  alignas(64) std::atomic<int> epoch_{0};
  alignas(64) std::atomic<int> left_{0};
  std::atomic<bool> stop_{false};
};

// A few parts per thread, taken as threads come, even out their speeds: as the kernels of this package.
void parallel(long count, int threads, const std::function<void(long, long)>& part) {
  static std::vector<std::unique_ptr<Pool>> pools;
  if (threads == 1) return part(0, count);
  if (static_cast<int>(pools.size()) <= threads) pools.resize(threads + 1);
  if (!pools[threads]) pools[threads] = std::make_unique<Pool>(threads);
  const long size = std::max(1l, count / (4 * threads));
  std::atomic<long> next{0};
  pools[threads]->run([&](int) {
    for (long first; (first = next.fetch_add(size, std::memory_order_relaxed)) < count;) part(first, std::min(count, first + size));
  });
}

// ---- activations
struct Activations {
  std::vector<std::int8_t> high, low;   // [padded columns]; a8 has no low part
  std::vector<float> scale;             // [blocks]
  std::vector<std::int32_t> start_high, start_low;  // -8 sum(x) of each block: where its accumulators begin

  // x float32 [cols], zeros behind it up to blocks * 32.
  template <bool kA16>
  void quantize(const float* x, long cols, long blocks) {
    high.resize(blocks * kBlockCols);
    low.resize(kA16 ? blocks * kBlockCols : 0);
    scale.resize(blocks);
    start_high.resize(blocks);
    start_low.resize(blocks);
    constexpr float kLimit = kA16 ? 127 * 256 + 127 : 127;
    for (long b = 0; b < blocks; ++b) {
      const long left = std::clamp(cols - b * kBlockCols, 0l, kBlockCols);
      const __m512 x0 = _mm512_maskz_loadu_ps(mask(left), x + b * kBlockCols);
      const __m512 x1 = _mm512_maskz_loadu_ps(mask(left - 16), x + b * kBlockCols + 16);
      const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1)));
      const __m512 inverse = _mm512_set1_ps(largest > 0 ? kLimit / largest : 0);
      scale[b] = largest / kLimit;
      __m512i sum_high = _mm512_setzero_si512(), sum_low = sum_high;
      for (int half = 0; half < 2; ++half) {
        const long at = b * kBlockCols + 16 * half;
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(half ? x1 : x0, inverse));
        const __m512i h = kA16 ? _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8) : v;
        sum_high = _mm512_add_epi32(sum_high, h);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(&high[at]), _mm512_cvtepi32_epi8(h));
        if constexpr (kA16) {
          const __m512i l = _mm512_sub_epi32(v, _mm512_slli_epi32(h, 8));
          sum_low = _mm512_add_epi32(sum_low, l);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(&low[at]), _mm512_cvtepi32_epi8(l));
        }
      }
      start_high[b] = -8 * _mm512_reduce_add_epi32(sum_high);
      start_low[b] = -8 * _mm512_reduce_add_epi32(sum_low);
    }
  }

  static __mmask16 mask(long left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }
};

__m512i four(const std::int8_t* x) {
  std::int32_t word;
  __builtin_memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}

// ---- y of kTiles tiles that lie one behind the other
template <bool kA16, int kTiles>
void tiles(const std::uint8_t* weight, const Activations& x, float* y, long pairs) {
  const __m512i low_nibble = _mm512_set1_epi8(0x0f), high_nibble = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512 sum[kTiles];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  for (long pair = 0; pair < pairs; ++pair) {
    for (int half = 0; half < 2; ++half) {
      const long b = 2 * pair + half;
      const std::int8_t *xh = x.high.data() + b * kBlockCols, *xl = kA16 ? x.low.data() + b * kBlockCols : nullptr;
      const __m512 scale = _mm512_set1_ps(x.scale[b]);
#pragma GCC unroll 4
      for (int n = 0; n < kTiles; ++n) {
        const std::uint8_t* tile = weight + (n * pairs + pair) * kPairBytes;
        const std::uint8_t* planes = tile + 256 * half;
        __m512i lo = _mm512_set1_epi32(x.start_high[b]), hi = _mm512_setzero_si512();
        __m512i lo_l = _mm512_set1_epi32(kA16 ? x.start_low[b] : 0), hi_l = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          _mm_prefetch(planes + 64 * p + kFarAhead, _MM_HINT_T1);
          _mm_prefetch(planes + 64 * p + kPrefetch, _MM_HINT_T0);
          const __m512i bytes = _mm512_load_si512(planes + 64 * p);
          const __m512i q0 = _mm512_and_si512(bytes, low_nibble), q1 = _mm512_and_si512(bytes, high_nibble);
          lo = _mm512_dpbusd_epi32(lo, q0, four(xh + 8 * p));
          hi = _mm512_dpbusd_epi32(hi, q1, four(xh + 8 * p + 4));
          if constexpr (kA16) {
            lo_l = _mm512_dpbusd_epi32(lo_l, q0, four(xl + 8 * p));
            hi_l = _mm512_dpbusd_epi32(hi_l, q1, four(xl + 8 * p + 4));
          }
        }
        if (half) _mm_prefetch(tile + 512 + kFarAhead, _MM_HINT_T1), _mm_prefetch(tile + 512 + kPrefetch, _MM_HINT_T0);
        __m512i dot = _mm512_add_epi32(lo, _mm512_srai_epi32(hi, 4));
        if constexpr (kA16) {
          dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), _mm512_add_epi32(lo_l, _mm512_srai_epi32(hi_l, 4)));
        }
        const __m512 scales = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(tile + 512 + 32 * half)));
        sum[n] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale), scales, sum[n]);
      }
    }
  }
  for (int n = 0; n < kTiles; ++n) _mm512_storeu_ps(y + kTileRows * n, sum[n]);
}

template <bool kA16>
void gemv(const std::uint8_t* weight, const float* x, float* y, long rows, long cols, int threads) {
  static Activations activations;
  const long count = (rows + kTileRows - 1) / kTileRows, pairs = (cols + 2 * kBlockCols - 1) / (2 * kBlockCols);
  activations.quantize<kA16>(x, cols, 2 * pairs);
  parallel((count + 1) / 2, threads, [&](long first, long last) {
    for (long two = first; two < last; ++two) {
      const std::uint8_t* tile = weight + 2 * two * pairs * kPairBytes;
      if (2 * two + 1 < count) {
        tiles<kA16, 2>(tile, activations, y + 2 * two * kTileRows, pairs);
      } else {
        tiles<kA16, 1>(tile, activations, y + 2 * two * kTileRows, pairs);
      }
    }
  });
}

std::uint64_t read_once(const std::uint8_t* from, long lines) {
  __m512i a[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  long i = 0;
  for (; i + 4 <= lines; i += 4) {
    for (int k = 0; k < 4; ++k) {
      _mm_prefetch(from + 64 * (i + k) + kFarAhead, _MM_HINT_T1);
      _mm_prefetch(from + 64 * (i + k) + kAhead, _MM_HINT_T0);
      a[k] = _mm512_xor_si512(a[k], _mm512_load_si512(from + 64 * (i + k)));
    }
  }
  for (; i < lines; ++i) a[0] = _mm512_xor_si512(a[0], _mm512_load_si512(from + 64 * i));
  return _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a[0], a[1]), _mm512_xor_si512(a[2], a[3])));
}

}  // namespace

extern "C" {

// `count` products one after the other: weights[i] (64-byte aligned) times x float32 [cols] into y float32 [tiles * 16].
// bits: 8 or 16, of the activations.  Not to be called by two threads at once.
void int4_gemv(const std::uint8_t* const* weights, long count, const float* x, float* y, long rows, long cols, int bits, int threads) {
  for (long i = 0; i < count; ++i) {
    (bits == 8 ? gemv<false> : gemv<true>)(weights[i], x, y, rows, cols, threads);
  }
}

// Reads `count` stretches of `bytes` bytes (64-byte aligned), one after the other, each by all threads; returns a checksum.
std::uint64_t read_stretches(const std::uint8_t* const* from, long count, long bytes, int threads) {
  std::atomic<std::uint64_t> sum{0};
  for (long i = 0; i < count; ++i) {
    parallel(bytes / 64, threads, [&](long first, long last) {
      sum.fetch_add(read_once(from[i] + 64 * first, last - first), std::memory_order_relaxed);
    });
  }
  return sum;
}
}
