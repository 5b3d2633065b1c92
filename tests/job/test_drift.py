"""Targets that make up for the drift of the quantized model, against plain NumPy."""
import dataclasses

import numpy as np
import pytest
import torch
from job.tiny_models import build, logits, preset
from torch.utils._python_dispatch import TorchDispatchMode

import gptvq
from gptvq import hessian
from gptvq.config import Recipe, VQConfig
from gptvq.drift import Stage, collect, find_stages, run_dense, target_weight
from gptvq.hessian import Hessian
from gptvq.model import embed, find_blocks, linears, record_calls, unfuse_experts
from gptvq.solver import solve

CPU = torch.device("cpu")


def opened(name, ids):
    """(block 0 with its recorded call, its linears by short name, the hidden states that enter it)."""
    model = build(name)
    blocks = find_blocks(model, ids[:1])
    unfuse_experts(model, blocks)
    record_calls(model, blocks, ids[:1], CPU)
    found = linears(blocks[0].module, blocks[0].name)
    return blocks[0], found, embed(model, blocks, ids)


def stages(name, ids):
    """[(short names, aligned, summed)]"""
    block, found, hidden = opened(name, ids)
    return [([full.removeprefix(block.name + ".") for full in stage.names], stage.aligned, stage.summed)
            for stage in find_stages(block, found, hidden[0])]


def oracle_target(W, x, v, wanted, recipe):
    """The W* that minimises sum_t |W* x_t - (W x_t + wanted_t - v_t)|^2 + sum_j penalty_j |W*_j - W_j|^2 over columns j, in float64."""
    W, x, v, wanted = (np.asarray(a, np.float64) for a in (W, x, v, wanted))
    H = 2 / len(x) * x.T @ x
    penalty = recipe.damp * np.mean(np.diag(H)) * (1 + recipe.ridge) + recipe.ridge * np.diag(H)
    return W + np.linalg.solve(H + np.diag(penalty), 2 / len(x) * x.T @ (wanted - v)).T


@pytest.mark.parametrize("rows,cols,tokens", [(5, 7, 40), (33, 18, 25), (4, 30, 12)], ids=["plenty", "ragged", "fewer tokens than inputs"])
@pytest.mark.parametrize("damp, ridge", [(0.01, 0.0), (0.3, 0.0), (0.01, 0.3)])
def test_target_weight_is_the_damped_least_squares_solution(rows, cols, tokens, damp, ridge):
    W, x, x_dense = torch.randn(rows, cols), torch.randn(tokens, cols) * torch.logspace(-1, 1, cols), torch.randn(tokens, cols)
    x[:, 3] = 0                                         # a dead input: nothing is known of its column
    hessian = Hessian(cols)
    hessian.add(x)
    drift = 2 / tokens * W @ (x_dense - x).T @ x
    recipe = Recipe(damp=damp, ridge=ridge)
    got = target_weight(W, hessian, drift, recipe)
    assert np.allclose(got.numpy(), oracle_target(W, x, x @ W.T, x_dense @ W.T, recipe), rtol=1e-3, atol=1e-3)
    assert torch.equal(got[:, 3], W[:, 3])
    half = target_weight(W, hessian, drift, dataclasses.replace(recipe, compensate=0.5))
    assert torch.allclose(half, (W + got) / 2, atol=1e-5)


def test_linears_come_in_the_order_of_the_call(ids):
    attention = [(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], True, False), (["self_attn.o_proj"], True, True)]
    plain = [(["mlp.gate_proj", "mlp.up_proj"], True, False), (["mlp.down_proj"], True, True)]
    assert stages("llama", ids) == stages("llama-bias", ids) == attention + plain
    gpt2 = stages("gpt2", ids)
    assert gpt2 == [(["attn.c_attn"], True, False), (["attn.c_proj"], True, True), (["mlp.c_fc"], True, False), (["mlp.c_proj"], True, True)]
    after_a_norm = [summed for _, aligned, summed in stages("gemma2", ids) if aligned]
    assert after_a_norm == [False] * 4                  # its blocks normalise what they add to the residual stream


def test_experts_make_one_stage(ids):
    """A token reaches other experts in the other stream, so there is nothing to compare."""
    mixtral = stages("mixtral", ids)
    assert [aligned for _, aligned, _ in mixtral] == [True, True, False]
    assert sorted(mixtral[2][0]) == sorted(f"mlp.experts.{e}.{m}_proj" for e in range(4) for m in ("gate", "up", "down"))
    shared = {name for names, aligned, _ in stages("qwen2-moe", ids) if aligned for name in names}
    assert {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"} < shared
    assert not any(".experts." in name for name in shared)


def test_linears_called_twice_or_never_are_not_aligned(ids):
    block, found, hidden = opened("llama", ids)
    again = block.module.mlp
    real = again.forward
    again.forward = lambda x: again.down_proj(again.act_fn(again.gate_proj(x))) + real(x)
    block.module.spare = torch.nn.Linear(4, 4)
    spare = f"{block.name}.spare"
    got = find_stages(block, {**found, spare: block.module.spare}, hidden[0])
    assert [stage.aligned for stage in got] == [True, True, False, True]
    assert set(got[2].names) == {f"{block.name}.mlp.gate_proj", f"{block.name}.mlp.down_proj", spare}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_drift_is_that_of_the_two_streams(name, ids):
    """Every stage's target against what hooks on two plain runs see."""
    block, found, hidden = opened(name, ids)
    order = find_stages(block, found, hidden[0])
    outputs, compared = run_dense(block, order, found, hidden, CPU)
    assert torch.equal(torch.cat(outputs), torch.cat([block(state) for state in hidden]))
    drifted = [state + 0.3 * torch.randn_like(state) for state in hidden]

    def seen(full, states):
        log = []
        handle = found[full].register_forward_hook(lambda m, args, out: log.append((args[0][0].double(), out[0].double())))
        with torch.no_grad():
            for state in states:
                block(state)
        handle.remove()
        return (torch.cat(parts).numpy() for parts in zip(*log))

    residual = [state[0].double().numpy() for state in (torch.cat(hidden, 1), torch.cat(drifted, 1))]
    for stage in order:
        got = collect(stage, {full: found[full] for full in stage.names}, block, drifted, compared, CPU)
        for full in stage.names:
            (_, wanted), (x, y) = seen(full, hidden), seen(full, drifted)
            if stage.summed:
                wanted, y = wanted + residual[0], y + residual[1]
            if stage is order[1]:                       # what comes after the attention reads these sums
                residual_after = wanted, y
            weight = (found[full].weight.T if name == "gpt2" else found[full].weight).detach()
            target = got.target(full, weight.float(), Recipe())
            want = oracle_target(weight, x, y, wanted, Recipe())
            assert np.linalg.norm(target.numpy() - want) < 1e-3 * np.linalg.norm(want)
            assert np.linalg.norm(target.numpy() - weight.numpy()) > 0.05 * np.linalg.norm(want)
        if stage is order[1]:
            residual = residual_after


def test_without_drift_the_target_is_the_weight(ids):
    block, found, hidden = opened("llama", ids)
    order = find_stages(block, found, hidden[0])
    wanted = run_dense(block, order, found, hidden, CPU)[1]
    for stage in order:
        inputs = collect(stage, {full: found[full] for full in stage.names}, block, hidden, wanted, CPU)
        for full in stage.names:
            assert torch.equal(inputs.target(full, found[full].weight, Recipe()), found[full].weight)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2-moe"])
def test_the_output_gets_nearer_to_the_dense_one(name):
    ids = torch.randint(0, 256, (24, 48))
    want = logits(build(name), ids)
    errors = []
    for compensate in (0.0, 1.0):
        recipe = Recipe(em_iterations=5, passes=1, sweeps=1, cg_iterations=3, compensate=compensate)
        report = gptvq.quantize(build(name), None, VQConfig.preset("2d-2.25", recipe=recipe), calibration=ids)
        errors.append(float((logits(report.model, ids) - want).square().sum() / want.square().sum()))
    assert errors[1] < 0.97 * errors[0]


def test_two_runs_give_the_same_bytes(ids):
    runs = [gptvq.quantize(build("mixtral"), None, preset(), calibration=ids) for _ in range(2)]
    assert [r.sha256 for r in runs[0].layers] == [r.sha256 for r in runs[1].layers]


@pytest.mark.parametrize("recipe", [Recipe.paper(em_iterations=3), Recipe(em_iterations=3, passes=1, sweeps=0, compensate=0)])
def test_without_compensation_each_weight_is_solved_on_the_inputs_of_its_dense_block(ids, recipe):
    block, found, hidden = opened("llama", ids)
    report = gptvq.quantize(build(), None, VQConfig.preset("2d-2.25", recipe=recipe), calibration=ids)
    for record in report.layers[:7]:
        inputs, hessian = [], Hessian(record.cols)
        handle = found[record.name].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        with torch.no_grad():
            for state in hidden:
                block(state)
        handle.remove()
        for x in inputs:
            hessian.add(x)
        assert solve(found[record.name].weight, hessian, record.spec, recipe)[1].sha256 == record.sha256


def test_a_block_that_changes_its_ways_is_named(ids):
    block, found, hidden = opened("llama", ids)
    stage = Stage((f"{block.name}.mlp.gate_proj",), aligned=True, summed=True)
    with pytest.raises(gptvq.ConfigError, match="gate_proj.*compensate=0"):
        run_dense(block, [stage], found, hidden, CPU)
    with pytest.raises(gptvq.ConfigError, match="gate_proj.*compensate=0"):
        collect(stage, {stage.names[0]: found[stage.names[0]]}, block, hidden, {stage.names[0]: hidden}, CPU)


class Looks(TorchDispatchMode):
    """Counts what would make a GPU finish all its work first: a value or an unknown number of them fetched from it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.index.Tensor):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("free", [True, False])
def test_non_finite_inputs_count_as_dropped_and_leave_no_drift(ids, free, monkeypatch):
    block, found, hidden = opened("llama", ids)
    stage = find_stages(block, found, hidden[0])[0]
    bad = [hidden[0] * float("nan"), *hidden[1:]]
    wanted = run_dense(block, [stage], found, hidden, CPU)[1]
    monkeypatch.setattr(hessian, "looking_is_free", lambda device: free)                 # False: as on a GPU
    with Looks() as looks:
        inputs = collect(stage, {full: found[full] for full in stage.names}, block, bad, wanted, CPU)
    assert len(looks.found) == (2 * len(bad) if free else 1), looks.found      # on a GPU only the number of tokens at last
    assert inputs.hessians[stage.names[0]].dropped == ids.shape[1]
    assert torch.equal(inputs.drift, torch.zeros_like(inputs.drift))


def with_lost_samples(ids, device):
    """What `collect` gives where a sample is lost in one stream and one in both."""
    block, linears_, hidden = opened("llama", ids)
    block.to(device)
    stage = find_stages(block, linears_, hidden[0].to(device))[0]
    wanted = run_dense(block, [stage], linears_, [1.01 * h for h in hidden], device)[1]
    wanted[stage.names[0]][2] = wanted[stage.names[0]][2] / 0
    hidden[5] = hidden[5] * float("inf")
    inputs = collect(stage, {full: linears_[full] for full in stage.names}, block, hidden, wanted, device)
    assert inputs.drift.abs().max() > 0
    for one in inputs.hessians.values():
        assert (one.tokens, one.dropped) == ((len(ids) - 1) * ids.shape[1], ids.shape[1])
    return inputs


def test_what_a_gpu_is_not_asked_for_changes_nothing(ids, monkeypatch):
    found = with_lost_samples(ids, CPU)
    monkeypatch.setattr(hessian, "looking_is_free", lambda device: False)
    other = with_lost_samples(ids, CPU)
    assert torch.equal(found.drift, other.drift)
    for name, one in found.hessians.items():
        assert torch.equal(one.sum.triu(), other.hessians[name].sum.triu())


@pytest.mark.gpu
def test_lost_samples_on_a_gpu(ids):
    want, found = with_lost_samples(ids, CPU), with_lost_samples(ids, torch.device("cuda"))
    for a, b in [(found.drift, want.drift), *((one.sum.triu(), want.hessians[name].sum.triu()) for name, one in found.hessians.items())]:
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
