"""The whole quantizer with its kernels in the emulator, and on a GPU where there is one, against the reference."""
import weakref

import pytest
import torch
from cases import Case
from job.tiny_models import build, logits, preset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptvq
from gptvq import codebook, ops
from gptvq.backends import cuda, cuda_call, reference
from gptvq.config import Recipe
from gptvq.errors import BackendUnavailable
from gptvq.hessian import Counts, Hessian
from gptvq.linear import VQLinear
from gptvq.problem import solving_bytes
from gptvq.solver import solve

LAYERS = [
    Case("1d K8", 48, 64, 1, 3, 16, 32), Case("2d K16", 64, 96, 2, 2, 32, 32), Case("2d K16 scales, ragged", 40, 88, 2, 2, 16, 64, 16),
    Case("2d K64 odd columns", 64, 75, 2, 3, 64, 128), Case("4d K256", 96, 64, 4, 2, 96, 64),
    Case("4d +-K256 scales", 96, 64, 4, 3, 96, 64, 64),
]


def solved(case, recipe, device, monkeypatch, backend):
    monkeypatch.setenv("GPTVQ_BACKEND", backend)
    W, H = case.build(torch.float32)
    return solve(W.to(device), H.to(device), case.spec, recipe)


@pytest.mark.parametrize("order", ["importance", "sequential"])
@pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)
def test_same_codes_as_the_reference(machine, case, order, monkeypatch):
    """All but ties, and what ties decide; every run the same bytes.  One start, since devices draw different ones."""
    recipe = Recipe(order=order, em_starts=1)
    want, ours = solved(case, recipe, "cpu", monkeypatch, "reference")
    codes = want.codes()
    for _ in machine.orders(("reverse", "random")):
        got, theirs = solved(case, recipe, machine.device, monkeypatch, "cuda")
        assert (got.codes().cpu() == codes).float().mean() > 0.97
        assert abs(theirs.error / ours.error - 1) < 0.01
        assert solved(case, recipe, machine.device, monkeypatch, "cuda")[1].sha256 == theirs.sha256


def test_paper_method_and_default_recipe(machine, monkeypatch):
    case = LAYERS[2]
    for recipe in (Recipe.paper(), Recipe()):
        ours, theirs = (solved(case, recipe, device, monkeypatch, backend)[1].error
                        for device, backend in (("cpu", "reference"), (machine.device, "cuda")))
        assert abs(theirs / ours - 1) < 0.03


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)
def test_packed_linear(machine, case, monkeypatch):
    vq, _ = solved(case, Recipe(passes=1, sweeps=0), "cpu", monkeypatch, "reference")
    layer, x = VQLinear.from_weight(vq, torch.randn(case.rows)), torch.randn(3, case.cols)
    want = layer(x)
    monkeypatch.setenv("GPTVQ_BACKEND", "cuda")
    assert ops.backend(machine.device) is cuda
    got = layer.to(machine.device)(x.to(machine.device)).cpu()
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("label", ["2d-2.25", "4d-3.125-s64"])
def test_a_whole_model(machine, label, monkeypatch):
    """quantize() with its blocks on the device: the same errors, and a model that runs on either side."""
    ids, reports = torch.randint(0, 256, (4, 32)), {}
    for backend, device in (("reference", "cpu"), ("cuda", machine.device)):
        monkeypatch.setenv("GPTVQ_BACKEND", backend)
        reports[backend] = gptvq.quantize(build("llama-bias"), None, preset(label), calibration=ids, device=str(device))
    ours, theirs = ([record.error for record in reports[backend].layers] for backend in ("cuda", "reference"))
    assert len(ours) == 14 and sum(ours) == pytest.approx(sum(theirs), rel=0.03)
    monkeypatch.setenv("GPTVQ_BACKEND", "reference")
    want = logits(reports["cuda"].model.to("cpu"), ids[:1])
    monkeypatch.setenv("GPTVQ_BACKEND", "cuda")
    got = logits(reports["cuda"].model.to(machine.device), ids[:1].to(machine.device)).cpu()
    assert torch.allclose(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))


class Tally(TorchDispatchMode):
    """Most bytes of tensors made while it is active that lived at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key):
        self.now -= self.live.pop(key)


@pytest.mark.skipif(cuda.fit is reference.fit, reason="codebooks are fitted by the reference, which takes more")
@pytest.mark.parametrize("rows, cols, dim, bits, group, scale", [
    (256, 128, 2, 2, (16, 128), 0), (64, 192, 2, 2, (16, 64), 0), (128, 128, 2, 2, (16, 128), 64), (128, 128, 4, 2, (128, 128), 0), (128, 128, 4, 3, (128, 128), 64),
    (128, 128, 1, 3, (16, 32), 0), (512, 128, 1, 3, (16, 64), 64)])
def test_memory_of_solving_is_predicted(machine, rows, cols, dim, bits, group, scale, monkeypatch):
    monkeypatch.setattr(cuda_call, "empty", torch.empty)      # guards around outputs are no part of it
    case = Case(f"{rows} x {cols}", rows, cols, dim, bits, *group, scale)
    W, H = (t.to(machine.device) for t in case.build(torch.float32))
    hessian = Hessian(cols, machine.device)
    hessian.sum, hessian.counts = H, Counts(2)
    with Tally() as tally:
        solve(W, hessian, case.spec, Recipe(passes=1, sweeps=1, em_iterations=3))
    assert tally.peak <= solving_bytes(rows, case.spec) <= 2.5 * tally.peak


def test_too_little_memory_is_said_before(machine, monkeypatch):
    case = LAYERS[1]
    monkeypatch.setattr(cuda, "free_bytes", lambda device: (360_000, 1_000_000))
    with pytest.raises(BackendUnavailable, match="weight: solving 64 x 96 weights: needs 0.000516 GB on c.*, where 0.00036 of 0.001 GB are "
                                                 "free; 30 rows of 96 columns would fit"):
        solved(case, Recipe(), machine.device, monkeypatch, "cuda")
    monkeypatch.setattr(cuda, "free_bytes", lambda device: (10_000, 1_000_000))
    with pytest.raises(BackendUnavailable, match="no layer of 96 columns would fit; free memory"):
        solved(case, Recipe(), machine.device, monkeypatch, "cuda")


def test_points_are_drawn_by_weight():
    """The draw of GPUs: sums of integers, so nothing depends on the order of an addition."""
    g = torch.Generator().manual_seed(0)
    weight = torch.tensor([[1.0, 0, 3, 4], [0, 0, 2e-30, 0]])
    picked = codebook.pick(weight, torch.rand(2, 40_000, dtype=torch.float64, generator=g))
    share = torch.bincount(picked[0], minlength=4) / 40_000
    assert torch.allclose(share, weight[0] / 8, atol=0.01) and share[1] == 0
    assert (picked[1] == 2).all()
    edges = codebook.pick(weight, torch.tensor([[0, 1 - 2**-53]] * 2, dtype=torch.float64))
    assert edges.tolist() == [[0, 3], [2, 2]]
    assert codebook.pick(torch.zeros(1, 5), torch.rand(1, 9, dtype=torch.float64)).max() < 5


def test_backend_is_chosen_by_name(machine, monkeypatch):
    assert ops.backend(machine.device) is cuda
    monkeypatch.setenv("GPTVQ_BACKEND", "reference")
    assert ops.backend(machine.device) is reference
