#include "cuda/em.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/em.cuh"
#include "cuda/em_1d.cuh"

namespace gptvq::cuda {
namespace {

constexpr std::int64_t kMostShared = 160 * 1024;    // of a thread block; devices of 8.6, 8.9 and 12.x have 99 KB
constexpr std::int64_t kSumsShared = 20 * 1024;     // for replicas of the sums: several blocks share a multiprocessor
constexpr int kMostReplicas = 8;
constexpr std::int64_t kMostSorted = 4096;          // points that a thread block sorts

template <int D>
EmPlan plan_vectors(const Points& p, std::int64_t shared) {
  const std::int64_t rows_of_group = p.points / p.metrics;
  EmPlan plan{};
  plan.rows = D == 4 || rows_of_group >= 16 ? 8 : 4;
  const std::int64_t units = (rows_of_group + plan.rows - 1) / plan.rows * p.metrics;
  plan.threads = static_cast<int>(units >= kEmThreads ? kEmThreads : units <= 64 ? 64 : (units + 31) / 32 * 32);
  plan.replicas = kMostReplicas;
  while (plan.replicas > 1 && 8 * kSums<D> * p.k * plan.replicas > kSumsShared) plan.replicas /= 2;
  plan.shared_bytes = EmShared<D>::bytes(static_cast<int>(p.k), plan.replicas);
  plan.scratch = plan.shared_bytes + p.points > shared;
  if (!plan.scratch) plan.shared_bytes += p.points;
  return plan;
}

Em1dArgs sorted_args(const Points& p, int size) {
  Em1dArgs args{};
  args.groups = static_cast<int>(p.groups);
  args.points = static_cast<int>(p.points);
  args.metrics = static_cast<int>(p.metrics);
  args.k = static_cast<int>(p.k);
  args.starts = static_cast<int>(p.starts);
  args.size = size;
  return args;
}

EmPlan plan_sorted(const Points& p, std::int64_t shared) {
  EmPlan plan{};
  int size = 1;
  while (size < p.points && size < kMostSorted) size *= 2;
  const int warps = static_cast<int>(p.starts >= kMostWarps ? kMostWarps : p.starts <= 4 ? 4 : p.starts);
  plan.threads = 32 * warps;
  plan.shared_bytes = Em1dShared::bytes(sorted_args(p, size), warps);
  plan.scratch = p.points > kMostSorted || plan.shared_bytes > shared;
  if (plan.scratch) plan.shared_bytes = Em1dShared::bytes(sorted_args(p, 0), warps);
  if (plan.shared_bytes > shared)
    throw std::invalid_argument("starts: got " + std::to_string(p.starts) + " of " + std::to_string(p.k) +
                                " centroids, more than shared memory holds");
  return plan;
}

template <int D, int P>
void launch_round(const EmPlan& plan, const EmArgs& args, std::uint64_t stream) {
  GPTVQ_LAUNCH((em_kernel<D, P>), dim3(static_cast<unsigned>(args.groups * args.starts)), dim3(static_cast<unsigned>(plan.threads)),
               static_cast<std::size_t>(plan.shared_bytes), stream, args);
}

template <bool kSorted>
void launch_1d(const EmPlan& plan, const Em1dArgs& args, std::uint64_t stream) {
  GPTVQ_LAUNCH(em_1d_kernel<kSorted>, dim3(static_cast<unsigned>(args.groups)), dim3(static_cast<unsigned>(plan.threads)),
               static_cast<std::size_t>(plan.shared_bytes), stream, args);
}

}  // namespace

std::string EmPlan::text() const {
  return (rows > 0 ? std::to_string(rows) + " points together, " + std::to_string(replicas) + " replicas, " : std::string("sorted, ")) +
         std::to_string(threads) + " threads, " + std::to_string(shared_bytes) + " bytes shared" + (scratch ? ", scratch" : "");
}

EmPlan em_plan(const Points& p, int device) {
  if (p.d != 1 && p.d != 2 && p.d != 4) throw std::invalid_argument("d: got " + std::to_string(p.d) + ", need 1, 2 or 4");
  if (p.k < 1 || p.k > 256) throw std::invalid_argument("k: got " + std::to_string(p.k) + ", need 1 to 256 centroids");
  if (p.groups < 1 || p.points < 1 || p.starts < 1 || p.metrics < 1 || p.points % p.metrics)
    throw std::invalid_argument("x, seeds, metric: need a group, a point, a start, and metrics whose number divides the points");
  constexpr std::int64_t most = std::int64_t{1} << 31;
  if (p.points >= most / 16 || p.metrics >= most / 64 || p.groups >= most / p.starts || p.starts >= most / p.k)
    throw std::invalid_argument("x, seeds: got sizes past what one launch takes");
  const std::int64_t shared = std::min(kMostShared, shared_memory(device));
  return p.d == 1 ? plan_sorted(p, shared) : p.d == 2 ? plan_vectors<2>(p, shared) : plan_vectors<4>(p, shared);
}

void fit_round(const Points& p, float* tried, std::int64_t iterations, double* loss, std::uint8_t* scratch, int device,
               std::uint64_t stream) {
  const EmPlan plan = em_plan(p, device);
  if (p.d == 1) throw std::invalid_argument("fit_round: got points of dimension 1, need 2 or 4");
  if (iterations < 1) throw std::invalid_argument("iterations: got " + std::to_string(iterations) + ", need at least 1");
  if (plan.scratch && !scratch) throw std::invalid_argument("scratch: got None, need a tensor because the groups are large");
  const auto size = [](std::int64_t value) { return static_cast<int>(value); };
  const EmArgs args{size(p.groups), size(p.points), size(p.metrics), size(p.k), size(p.starts),
                    size(iterations < (1 << 30) ? iterations : 1 << 30), plan.replicas, p.x, p.metric, p.weight, tried, loss,
                    plan.scratch ? scratch : nullptr};
  GPTVQ_DEVICE(device);
  (p.d == 4 ? launch_round<4, 8> : plan.rows == 8 ? launch_round<2, 8> : launch_round<2, 4>)(plan, args, stream);
}

void fit_1d(const Points& p, const float* seeds, const std::vector<Round>& rounds, float* centroids, double* scratch, int device,
            std::uint64_t stream) {
  const EmPlan plan = em_plan(p, device);
  if (p.d != 1) throw std::invalid_argument("fit_1d: got points of dimension " + std::to_string(p.d) + ", need 1");
  if (rounds.empty() || rounds.size() > kRounds)
    throw std::invalid_argument("rounds: got " + std::to_string(rounds.size()) + ", need 1 to " + std::to_string(kRounds));
  if (plan.scratch && !scratch) throw std::invalid_argument("scratch: got None, need a tensor because the groups are large");
  int bits = 0;
  while ((std::int64_t{1} << bits) < p.points) ++bits;
  Em1dArgs args = sorted_args(p, plan.scratch ? 0 : 1 << bits);
  args.rounds = static_cast<int>(rounds.size());
  for (std::size_t r = 0; r < rounds.size(); ++r) {
    if (rounds[r].iterations < 1 || rounds[r].keep < 1)
      throw std::invalid_argument("rounds: got 0, need an iteration and a start that stays");
    args.iterations[r] = static_cast<int>(rounds[r].iterations < (1 << 30) ? rounds[r].iterations : 1 << 30);
    args.keep[r] = static_cast<int>(rounds[r].keep < p.starts ? rounds[r].keep : p.starts);
  }
  args.x = p.x;
  args.metric = p.metric;
  args.weight = p.weight;
  args.seeds = seeds;
  args.centroids = centroids;
  args.sums = scratch;
  GPTVQ_DEVICE(device);
  (plan.scratch ? launch_1d<true> : launch_1d<false>)(plan, args, stream);
}

}  // namespace gptvq::cuda
