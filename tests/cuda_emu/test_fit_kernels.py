"""The CUDA kernels that fit codebooks against the oracle and the reference; several orders of threads give equal bits."""
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from cases import DEGENERATE, GENERIC, ids
from emulated_cuda import using
from quantize_cases import in_orders, inputs, to

from gptvq import ops
from gptvq.backends import cuda_call, cuda_quantize, reference
from gptvq.errors import ConfigError


@dataclass(frozen=True)
class Cloud:
    """Random points of several groups: `rows` of `metrics` columns each; `kind` says what is degenerate about them."""

    d: int
    rows: int
    metrics: int
    k: int
    kind: str = "gauss"
    groups: int = 2

    def build(self, starts=1):
        """x, metric, weight, seeds."""
        g = torch.Generator().manual_seed(self.rows + self.k)
        n = self.rows * self.metrics
        x = torch.randn(self.groups, n, self.d, generator=g)
        root = torch.randn(self.metrics, self.d, self.d, generator=g) * 0.3 + torch.eye(self.d)
        weight = torch.rand(self.groups, n, generator=g) + 0.5
        if self.kind == "equal":
            x = x[:, :1].expand_as(x).contiguous()
        if self.kind == "few values":
            x = x.sign()
        if self.kind == "padding":
            weight[0, n // 2:], weight[1, ::3] = 0, 0
            x[weight == 0] = 1e6
        if self.kind == "no weight":
            weight[1] = 0
        if self.kind == "wide weights":
            weight *= torch.exp(4 * torch.randn(weight.shape, generator=g))
        picked = torch.cat([torch.randperm(n, generator=g).repeat(-(-self.k // n))[: self.k] for _ in range(starts)])
        seeds = x[:, picked].unflatten(1, (starts, self.k)).transpose(0, 1).contiguous()
        if self.kind == "empty":
            seeds[:, :, self.k // 2:] = 1e3
        return x, root @ root.transpose(1, 2), weight, seeds


CLOUDS = [Cloud(2, 5, 13, 16), Cloud(2, 20, 7, 11), Cloud(4, 9, 6, 16), Cloud(1, 7, 11, 8), Cloud(2, 60, 1, 5), Cloud(1, 300, 1, 40),
          Cloud(4, 1, 30, 3), Cloud(2, 33, 21, 64), Cloud(4, 40, 13, 256), Cloud(1, 1, 1, 4), Cloud(2, 1, 1, 4),
          *(Cloud(d, 8, 12, 8, kind) for d in (1, 2, 4)
            for kind in ("equal", "few values", "padding", "no weight", "wide weights", "empty"))]


def losses(x, metric, weight, *tables):
    x, whole = x.double(), (metric.repeat(x.shape[1] // len(metric), 1, 1) * weight[..., None, None]).double()
    return [reference.distortion(x, whole, c.double()) for c in tables]


@pytest.mark.parametrize("cloud", CLOUDS, ids=str)
def test_one_step_of_em_is_the_oracles(machine, cloud):
    x, metric, weight, seeds = cloud.build()
    got, = in_orders(machine, lambda: [ops.fit(*to(machine, x, metric, weight, seeds), ((1, 1),))])
    whole = (metric.repeat(cloud.rows, 1, 1) * weight[..., None, None]).double().numpy()
    for g in range(cloud.groups):
        c = seeds[0, g].double().sort(0).values.numpy() if cloud.d == 1 else seeds[0, g].double().numpy()
        points = x[g].double().numpy()
        want = oracle.m_step(points, whole[g], oracle.e_step(points, whole[g], c), c)
        want, have = (t[np.lexsort(t.round(4).T[::-1])] for t in (want, got[g].double().numpy()))
        if cloud.kind not in ("equal", "few values"):           # there ties decide, and rounding decides those
            np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-4)
    assert got.isfinite().all()


@pytest.mark.parametrize("cloud", CLOUDS, ids=str)
def test_em_settles_where_every_centroid_is_the_mean_of_its_points(machine, cloud):
    """The sums that are kept from iteration to iteration still are those of the points."""
    x, metric, weight, seeds = cloud.build(starts=3)
    args, rounds = to(machine, x, metric, weight, seeds), ((4, 2), (300, 1))
    got, = in_orders(machine, lambda: [ops.fit(*args, rounds)], ("forward", "random"))
    want = reference.fit(x, metric, weight, seeds, rounds)
    loss, best, nothing, *first = losses(x, metric, weight, got, want, torch.zeros_like(want), *seeds)
    assert got.isfinite().all() and (loss <= 1.1 * best + 1e-5 * nothing).all()
    assert all((loss <= before * (1 + 1e-4) + 1e-9 * nothing).all() for before in first)
    whole = (metric.repeat(cloud.rows, 1, 1) * weight[..., None, None]).double()
    again = reference.em(x.double(), whole, got.double(), 1)
    if cloud.kind not in ("equal", "few values", "no weight") and cloud.k < cloud.rows * cloud.metrics / 3:
        torch.testing.assert_close(got.double(), again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_a_point_between_two_centroids_goes_to_the_first(machine, d):
    """And a point without weight, wherever it lies, to none."""
    x = torch.tensor([0.0, 2.0, 1.0, 1.75])[None, :, None].repeat(1, 1, d)
    weight, seeds = torch.tensor([[1.0, 1.0, 1.0, 0.0]]), x[None, :, :2].contiguous()
    got = ops.fit(*to(machine, x, torch.eye(d)[None], weight, seeds), ((1, 1),)).cpu()
    assert torch.equal(got, torch.tensor([0.5, 2.0])[None, :, None].repeat(1, 1, d))


@pytest.mark.parametrize("d", [1, 2, 4])
def test_em_stops_when_no_index_changed(machine, d):
    x, metric, weight, seeds = to(machine, *Cloud(d, 8, 12, 5).build(starts=2))
    assert torch.equal(ops.fit(x, metric, weight, seeds, ((1 << 40, 1),)), ops.fit(x, metric, weight, seeds, ((60, 1),)))


@pytest.mark.parametrize("case", GENERIC + DEGENERATE, ids=ids)
def test_fit_of_the_cases_is_as_good_as_the_reference(machine, case):
    problem, _, _, metric, _, _ = inputs(case)
    x = problem.W.reshape(1, -1, case.dim).repeat(2, 1, 1)
    x[1] = x[1].flip(0) * 1.5
    weight = torch.ones(x.shape[:2])
    weight[1, ::3], weight[0, ::5] = 0, 2.5
    for rounds in (((1, 1),), ((2, 2), (3, 1), (20, 1))):
        seeds = torch.stack([x[:, torch.linspace(0, x.shape[1] - 1, case.spec.codewords).long() // (1 + s)] for s in range(len(rounds))])
        got, = in_orders(machine, lambda: [ops.fit(*to(machine, x, metric, weight, seeds), rounds)], ("round robin",))
        loss, best, nothing = losses(x, metric, weight, got, reference.fit(x, metric, weight, seeds, rounds), torch.zeros_like(got))
        assert (loss <= best * (1 if len(rounds) == 1 else 1.05) + 1e-5 * nothing + 1e-9).all()


@pytest.mark.parametrize("d", [1, 2, 4])
def test_powers_of_two_change_nothing_but_the_exponent(machine, d):
    x, metric, weight, seeds = Cloud(d, 8, 9, 8).build(starts=2)
    rounds = ((3, 1), (20, 1))
    want = ops.fit(*to(machine, x, metric, weight, seeds), rounds).cpu()
    for a, b in ((2.0 ** 30, 2.0 ** -90), (2.0 ** -40, 2.0 ** 60), (2.0 ** 20, 2.0 ** 50)):
        got = ops.fit(*to(machine, x * a, metric * b, weight, seeds * a), rounds).cpu()
        assert torch.equal(got, want * a)


@pytest.mark.parametrize("d, points", [(1, 5000), (2, 170_000), (4, 170_000)])
def test_groups_too_large_for_shared_memory(machine, d, points):
    assert cuda_call.kernels.fit_plan(1, points, d, 3, 2, 1)["scratch"]
    x, metric, weight, seeds = Cloud(d, points, 1, 3, groups=1).build(starts=2)
    rounds = ((2, 1), (3, 1))
    got, = in_orders(machine, lambda: [ops.fit(*to(machine, x, metric, weight, seeds), rounds)], ("forward",))
    torch.testing.assert_close(got, reference.fit(x, metric, weight, seeds, rounds), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cloud", [Cloud(1, 4000, 1, 256, groups=1), Cloud(2, 110_000, 1, 3, groups=1), Cloud(4, 9, 6, 256, groups=1)], ids=str)
def test_devices_with_less_shared_memory(emulator, cloud, monkeypatch):
    """99 KB, as compute capability 8.6, 8.9 and 12.x have: groups move to global memory earlier, and nothing else changes."""
    x, metric, weight, seeds = cloud.build(starts=2)
    points, rounds, found = cloud.rows * cloud.metrics, ((2, 1), (3, 1)), []
    with using(emulator, monkeypatch):
        for limit, scratch in ((227, False), (99, points > 1000)):
            emulator.set_shared_memory(limit * 1024)
            try:
                assert emulator.fit_plan(1, points, cloud.d, cloud.k, 2, cloud.metrics)["scratch"] == scratch
                found.append(ops.fit(x, metric, weight, seeds, rounds))
            finally:
                emulator.set_shared_memory(227 * 1024)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("points, d, k, metrics, text", [
    (512, 2, 16, 128, "4 points together, 8 replicas, 128 threads"), (4096, 2, 64, 128, "8 points together, 8 replicas, 512 threads"),
    (16384, 4, 256, 64, "8 points together, 1 replicas, 512 threads"), (256, 1, 4, 256, "sorted, 256 threads"),
    (1, 4, 256, 1, "64 threads")])
def test_the_plan_of_a_fit_follows_the_group(machine, points, d, k, metrics, text):
    plan = cuda_call.kernels.fit_plan(64, points, d, k, 8, metrics)
    assert text in plan["text"] and not plan["scratch"]


@pytest.mark.parametrize("d", [1, 2])
def test_malformed_arguments_are_refused(machine, d):
    x, metric, weight, seeds = to(machine, *Cloud(d, 4, 6, 8).build())
    good = x, metric, weight, seeds, ((3, 1),)
    for change, message in (({1: metric[:-1]}, "metric"), ({2: weight[:, 1:]}, "weight: got"), ({4: ((0, 1),)}, "got 0"),
                            ({3: seeds.repeat(1, 1, 33, 1)}, "k: got 264"), *([({4: ((1, 1),) * 9}, "rounds: got 9")] if d == 1 else [])):
        with pytest.raises(ConfigError, match=message):
            cuda_quantize.fit(*[change.get(i, a) for i, a in enumerate(good)])
    assert cuda_quantize.fit(*[a.double() for a in good[:4]], good[4]).dtype == torch.float64         # by the reference
