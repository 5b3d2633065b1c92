"""Tokens weighted by the gradient of the loss: gradients against differences, weighted Hessians and targets against plain NumPy."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from job.test_drift import opened, oracle_target
from job.tiny_models import QUICK, build, logits

import gptvq
from gptvq.config import Recipe, VQConfig
from gptvq.drift import collect, find_stages, run_dense
from gptvq.errors import ConfigError, NumericalError
from gptvq.model import find_blocks, linears, record_calls, unfuse_experts
from gptvq.plan import plan
from gptvq.report import Progress
from gptvq.token_weights import loss_gradients, stage_weights

CPU = torch.device("cpu")
WEIGHTED = VQConfig.preset("2d-2.25", recipe=Recipe(**{**QUICK.__dict__, "token_weights": "loss"}))


def gradients_of(model, ids):
    blocks = find_blocks(model, ids[:1])
    unfuse_experts(model, blocks)
    record_calls(model, blocks, ids[:1], CPU)
    names = [name for block in blocks for name in linears(block.module, block.name)]
    return names, loss_gradients(model, blocks, names, ids, CPU)


@pytest.mark.parametrize("name, linear", [("llama", "model.layers.1.self_attn.v_proj"), ("gemma2", "model.layers.0.mlp.down_proj"),
                                          ("gpt2", "transformer.h.0.attn.c_attn")])
def test_gradients_are_those_of_the_loss(name, linear):
    """Moving each output of one token a little changes the loss as the gradient says."""
    model, ids, t = build(name), torch.randint(0, 256, (3, 12)), 5
    names, found = gradients_of(model, ids)
    assert list(found) == names and {g.shape for g in found.values()} == {(3, 12)}
    assert all(bool((g[:, -1] == 0).all()) for g in found.values())               # nothing is predicted from the last token
    model.double()
    width, slopes = (model.get_submodule(linear).bias if name == "gpt2" else model.get_submodule(linear).weight).shape[0], []
    for i in range(width):
        losses = []
        for step in (1e-3, -1e-3):
            def push(m, args, y, step=step, i=i):
                return y + step * F.one_hot(torch.tensor(i), width) * F.one_hot(torch.tensor(t), 12)[:, None]
            handle = model.get_submodule(linear).register_forward_hook(push)
            losses.append(F.cross_entropy(logits(model, ids[1:2])[0, :-1].double(), ids[1, 1:], reduction="sum"))
            handle.remove()
        slopes.append((losses[0] - losses[1]) / 2e-3)
    assert float(found[linear][1, t]) == pytest.approx(float(torch.stack(slopes).square().sum()), rel=1e-2)


def test_the_model_is_left_as_it_was():
    model, ids = build(), torch.randint(0, 256, (2, 12))
    first = next(model.parameters()).requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients_of(model, ids)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad == (p is not first) for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_that_are_not_finite_are_named():
    model = build()
    model.lm_head.weight.data[3] = float("inf")
    with pytest.raises(NumericalError, match="layers.0.self_attn.q_proj: the gradient of the loss"):
        gradients_of(model, torch.randint(0, 256, (2, 12)))


def test_weights_of_a_stage():
    g = {"a": torch.rand(3, 7), "b": 100 * torch.rand(3, 7), "zero": torch.zeros(3, 7)}
    a, b = (x.double().numpy() / float(x.double().mean()) for x in (g["a"], g["b"]))
    want = np.sqrt(a + b)                       # POWER, as it was measured
    assert np.allclose(stage_weights(g, ("a", "b")).numpy(), want / want.mean(), rtol=1e-5)
    assert float(stage_weights(g, ("a",)).mean()) == pytest.approx(1)
    assert stage_weights(g, ("a", "zero")) is stage_weights(g, ("missing", "a")) is stage_weights({}, ("a",)) is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weighted_hessians_and_targets(name, ids):
    block, found, hidden = opened(name, ids)
    order = find_stages(block, found, hidden[0])
    compared = run_dense(block, order, found, hidden, CPU)[1]
    drifted = [state + 0.3 * torch.randn_like(state) for state in hidden]
    weights = torch.rand(len(hidden), hidden[0].shape[1]).square()
    weights /= weights.mean()
    weights[2] = 0
    for stage in order:
        full, log = stage.names[0], []
        handle = found[full].register_forward_hook(lambda m, args, out: log.append((args[0][0].double(), out[0].double())))
        with torch.no_grad():
            for state in (*hidden, *drifted):
                block(state)
        handle.remove()
        half = len(hidden)
        (_, wanted), (x, y) = ([torch.cat(parts).numpy() for parts in zip(*log[at])] for at in (slice(half), slice(half, None)))
        if stage.summed and stage is order[-1]:
            continue                                    # its other summand is no hidden state of this block's call
        if stage.summed:
            wanted, y = (part + torch.cat(states, 1)[0].double().numpy() for part, states in ((wanted, hidden), (y, drifted)))
        got = collect(stage, {name: found[name] for name in stage.names}, block, drifted, compared, CPU, weights=weights)
        root = weights.flatten().sqrt().double().numpy()[:, None]
        assert np.allclose(got.hessians[full].matrix().numpy(), 2 / len(x) * (root * x).T @ (root * x), rtol=1e-3, atol=1e-4)
        weight = (found[full].weight.T if name == "gpt2" else found[full].weight).detach()
        want = oracle_target(weight, root * x, root * y, root * wanted, Recipe())
        assert np.linalg.norm(got.target(full, weight.float(), Recipe()).numpy() - want) < 1e-3 * np.linalg.norm(want)


def test_a_whole_job(tmp_path, ids):
    """Of a folder as of a module, and unlike without; the codes on disk are those in memory."""
    model = build()
    model.save_pretrained(tmp_path / "model")
    plain = VQConfig.preset("2d-2.25", recipe=QUICK)
    made = {name: gptvq.quantize(source, None, config, calibration=ids, device="cpu") for name, source, config in (
        ("folder", tmp_path / "model", WEIGHTED), ("module", build(), WEIGHTED), ("plain", build(), plain))}
    hashes = {name: [record.sha256 for record in report.layers] for name, report in made.items()}
    assert hashes["folder"] == hashes["module"] != hashes["plain"] and not made["folder"].warnings
    told = []
    progress = Progress()
    progress.stage = told.append
    report = gptvq.quantize(tmp_path / "model", tmp_path / "out", WEIGHTED, calibration=ids, device="cpu", check=None, progress=progress)
    assert f"weighing the calibration tokens: {len(ids)} of {len(ids)} sequences" in told
    assert [record.sha256 for record in report.layers] == hashes["module"] and report.stages["weights"] > 0
    with pytest.raises(gptvq.ResumeMismatch, match="token_weights"):
        gptvq.quantize(tmp_path / "model", tmp_path / "out", plain, calibration=ids, device="cpu", check=None)


def test_experts_are_named_as_unweighted(ids):
    report = gptvq.quantize(build("mixtral"), None, WEIGHTED, calibration=ids, device="cpu")
    noted = {warning.partition(":")[0] for warning in report.warnings if "all count the same" in warning}
    assert noted == {record.name for record in report.layers if ".experts." in record.name} and len(noted) == 24


def test_an_interrupted_run_notes_them_once(ids, tmp_path):
    def stop(index, name):
        if index == 1:
            raise KeyboardInterrupt

    progress = Progress()
    progress.block = stop
    with pytest.raises(KeyboardInterrupt):
        gptvq.quantize(build("mixtral"), tmp_path / "out", WEIGHTED, calibration=ids, device="cpu", check=None, progress=progress)
    for out in ("out", "whole"):
        gptvq.quantize(build("mixtral"), tmp_path / out, WEIGHTED, calibration=ids, device="cpu", check=None)
    assert (tmp_path / "out/report.json").read_bytes() == (tmp_path / "whole/report.json").read_bytes()


def test_a_plan_says_what_it_does_not_count(ids):
    (warning,) = plan(build(), WEIGHTED, samples=4, sequence_length=16, device="cpu").warnings
    assert "weighing the tokens" in warning


def test_contradictions():
    for values in ({"token_weights": "gradient"}, {"token_weights": "loss", "compensate": 0}):
        with pytest.raises(ConfigError, match="token_weights"):
            Recipe(**values)
    with pytest.raises(ConfigError, match="paper|token_weights"):
        Recipe.paper(token_weights="loss")
    assert VQConfig.from_dict(WEIGHTED.to_dict()) == WEIGHTED
