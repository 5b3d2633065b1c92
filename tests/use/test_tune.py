"""tune(): gradients of the codebooks against autograd through plain indexing, and models that get nearer to the dense one."""
import copy

import pytest
import torch

import gptvq
from gptvq.backends.reference import all_signs
from gptvq.learning import Learning, LearningLinear
from gptvq.linear import VQLinear
from gptvq.tune import Losses, tune
from gptvq.weight import unpack_scale_codes
from job.tiny_models import build, logits, preset

IDS = torch.arange(16 * 24).view(16, 24) * 5 % 251


def packed_layer(label, rows=40, cols=80):
    torch.manual_seed(1)
    vq = gptvq.quantize_weight(torch.randn(rows, cols), torch.eye(cols), preset(label))
    return VQLinear.from_weight(vq, torch.randn(rows), "layer")


@pytest.mark.parametrize("label", ["1d-2.25", "2d-2.25", "2d-2.25-s64", "4d-2.25", "2d-3.125", "4d-3.125-s64"])
def test_gradients_against_plain_indexing(label):
    layer = packed_layer(label)
    learner, x, spec = LearningLinear(layer), torch.randn(5, 80), layer.spec
    torch.testing.assert_close(learner(x), x @ layer.dequantize().T + layer.bias)
    pull = torch.randn(5, 40)
    (learner(x) * pull).sum().backward()
    table = learner.table.detach().double().requires_grad_()
    sz = None if learner.sz is None else learner.sz.detach().double().requires_grad_()
    group = torch.arange(spec.rows)[:, None] // spec.group_rows
    books = all_signs(table) if spec.signs else table
    W = (books * learner.unit.double())[group, learner.strip, learner.index.long()]
    if sz is not None:
        codes = unpack_scale_codes(layer.sc, spec)
        scale = torch.stack([2 ** (sz[b, 0] + sz[b, 1] * codes[:, b]) for b in range(spec.scale_blocks)], 1)
        W = W * scale.repeat_interleave(spec.scale_block // spec.dim, 1)[:, : spec.vectors].unsqueeze(-1)
    W = W.reshape(spec.rows, -1)[:, :80]
    ((x.double() @ W.T) * pull).sum().backward()
    torch.testing.assert_close(learner.table.grad.double(), table.grad, rtol=1e-5, atol=1e-5 * float(table.grad.abs().max()))
    if sz is not None:
        torch.testing.assert_close(learner.sz.grad.double(), sz.grad, rtol=1e-5, atol=1e-5 * float(sz.grad.abs().max()))


@pytest.mark.parametrize("label", ["1d-2.25", "2d-2.25-s64", "4d-2.25", "4d-3.125"])
def test_nothing_learnt_changes_nothing(label):
    layer = packed_layer(label)
    back = LearningLinear(layer).frozen()
    torch.testing.assert_close(back.dequantize(), layer.dequantize(), rtol=0, atol=float(layer.dequantize().abs().max()) / 250)
    assert torch.equal(back.idx, layer.idx) and torch.equal(back.bias, layer.bias)


def test_signs_stay_in_the_indices():
    """An entry of the signed format that a step takes below its least stays positive, and what is stored is what learnt."""
    layer = packed_layer("4d-3.125")
    model = torch.nn.Sequential(layer)
    with Learning(model, {"0": layer}, steps=20, rate=0.05) as learning:
        learner = learning.learners["0"]
        for _ in range(20):
            learning.step(learner.weight.abs().sum() + model(torch.randn(4, 80)).square().mean(), "loss")
        assert float(learner.table.detach().min()) == pytest.approx(1 / 127)
        learnt = learner.weight.detach()
    packed = model[0]
    assert isinstance(packed, VQLinear) and int(packed.cb.min()) >= 1 and torch.equal(packed.idx, layer.idx)
    assert (packed.dequantize() - learnt).abs().max() <= 0.51 * float(packed.gs.float().max())
    packed.check()


def divergence(model, dense):
    a, b = logits(dense, IDS).log_softmax(-1), logits(model, IDS).log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_gets_nearer_to_the_dense_one(dtype):
    dense = build("llama", dtype)
    model = gptvq.quantize(copy.deepcopy(dense), None, preset("2d-2.25"), calibration=IDS).model
    before, codes = divergence(model, dense), {n: b.clone() for n, b in model.named_buffers() if n.endswith(".idx")}
    heard = []
    losses = tune(model, dense, IDS.repeat(4, 1), batch=4, rate=3e-3, progress=lambda *said: heard.append(said))
    assert divergence(model, dense) < 0.9 * before
    assert len(losses) == 16 and heard[-1] == (16, 16, losses[-1]) and losses.after < losses.before
    assert codes and all(torch.equal(b, codes[n]) for n, b in model.named_buffers() if n in codes)
    assert not any(isinstance(m, LearningLinear) for m in model.modules()) and not model.training
    assert all(p.dtype == dtype and p.grad is None for p in model.parameters())


def test_it_learns_without_dropout():
    """GPT-2 has some, which would have codebooks make up for noise; the models' modes are theirs again afterwards."""
    dense = build("gpt2")
    model = gptvq.quantize(copy.deepcopy(dense), None, preset("2d-2.25"), calibration=IDS).model
    want = divergence(model, dense)
    model.train()
    dense.train()
    losses = tune(model, dense, IDS.repeat(2, 1), batch=16, rate=0.0)
    assert model.training and dense.training and all(module.training for module in model.modules())
    assert losses == pytest.approx([want, want], rel=0.02)          # what learns may be stored in fewer digits
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.parametrize("label", ["2d-2.25", "2d-2.25-s64", "4d-2.25", "4d-3.125-s64"])
def test_on_a_gpu(label):
    """Gradients of codebooks and scales by its kernels are the CPU's, and a model gets nearer to the dense one."""
    layer, x = packed_layer(label), torch.randn(5, 80)
    found = {}
    for device in ("cpu", "cuda"):
        learner = LearningLinear(copy.deepcopy(layer).to(device))
        learner(x.to(device)).square().sum().backward()
        found[device] = [p.grad.cpu() for p in (learner.table, learner.sz) if p is not None]
    for cpu, gpu in zip(*found.values()):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4 * float(cpu.abs().max()))
    dense = build("llama").cuda()
    model = gptvq.quantize(copy.deepcopy(dense), None, preset(label), calibration=IDS, device="cuda").model.cuda()
    losses = tune(model, dense, IDS.repeat(4, 1), batch=4, rate=3e-3)
    assert losses[-1] < losses[0]


def test_tuned_models_are_stored_as_any_other(tmp_path):
    dense = build("llama")
    model = gptvq.quantize(copy.deepcopy(dense), tmp_path / "plain", preset("2d-2.25"), calibration=IDS).model
    tune(model, dense, IDS, batch=4)
    model.save_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(gptvq.load(tmp_path / "tuned"), IDS), logits(model, IDS))


def test_it_is_left_packed_whatever_happens():
    dense = build("llama")
    model = gptvq.quantize(copy.deepcopy(dense), None, preset("2d-2.25"), calibration=IDS).model
    plain = logits(model, IDS)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, dense, IDS, rate=0.0, progress=stop)
    torch.testing.assert_close(logits(model, IDS), plain, rtol=0, atol=0.05 * float(plain.abs().max()))
    with pytest.raises(gptvq.ConfigError, match="without packed linears"):
        tune(dense, dense, IDS)
    with pytest.raises(gptvq.ConfigError, match="rate: got -1.0"):
        tune(model, dense, IDS, rate=-1.0)
    steps = tune(copy.deepcopy(model), dense, IDS, rate=0.0)
    assert steps.after == pytest.approx(steps.before, rel=0.05)                     # rounding alone is no error
    with pytest.MonkeyPatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(torch.optim, "Adam", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
        tune(model, dense, IDS)
    plain = logits(model, IDS)
    assert sum(isinstance(m, VQLinear) for m in model.modules()) == 14
    with pytest.raises(gptvq.NumericalError, match="smaller rate"):
        tune(model, dense, IDS, rate=1e30)
    assert torch.equal(logits(model, IDS), plain)
    assert sum(isinstance(m, VQLinear) for m in model.modules()) == 14


def test_from_folder_to_folder(my_model, tmp_path, capsys):
    """`gptvq tune`: the same size and format, hashes that are right, a report that says so, and no unfinished folder."""
    from gptvq import cli

    text = my_model.parent / "calibration.txt"
    assert cli.main(["quantize", str(my_model), str(tmp_path / "packed"), "--calibration", str(text), "--samples", "2",
                     "--sequence-length", "32"]) == 0
    learn = ["--dense", str(my_model), "--calibration", str(text), "--samples", "8", "--sequence-length", "32"]
    assert cli.main(["tune", str(tmp_path / "packed"), str(tmp_path / "tuned"), *learn]) == 0
    assert "in 2 steps" in capsys.readouterr().out
    before, after = (gptvq.Report.load(tmp_path / name) for name in ("packed", "tuned"))
    assert gptvq.verify(tmp_path / "tuned").layers == len(after.layers) and after.bits_per_value == before.bits_per_value
    assert any("tuned in 2 steps" in text for text in after.warnings)
    assert sum(a.sha256 != b.sha256 for a, b in zip(before.layers, after.layers)) > len(after.layers) / 2       # int8 may swallow a small step
    (tmp_path / "link").symlink_to(my_model)
    model = (my_model / "model.safetensors").read_bytes()
    for out in (tmp_path / "packed", my_model, tmp_path / "link"):
        assert cli.main(["tune", str(tmp_path / "packed"), str(out), *learn, "--overwrite"]) == 1
        assert "model's own folder" in capsys.readouterr().err
    assert (my_model / "model.safetensors").read_bytes() == model


def test_a_model_that_came_no_nearer_is_said(capsys, monkeypatch):
    from gptvq import cli

    losses = Losses([0.5])
    monkeypatch.setattr("gptvq.tune.tune_folder", lambda *args, **options: losses)
    for losses.before, losses.after, warned in ((0.5, 0.4, False), (0.5, 0.51, True)):
        assert cli.main(["tune", "a", "b", "--dense", "c", "--calibration", "text"]) == 0
        said = capsys.readouterr()
        assert f"0.5000 -> {losses.after:.4f}" in said.out and ("warning: the model came no nearer" in said.err) == warned


def test_block_by_block_from_the_command_line(my_model, tmp_path, capsys):
    """`gptvq quantize --distill`: errors of the blocks in the report, hashes that are right, a resumed call that finds it done."""
    from gptvq import cli

    line = ["quantize", str(my_model), str(tmp_path / "learnt"), "--calibration", str(my_model.parent / "calibration.txt"), "--samples", "4",
            "--sequence-length", "32", "--distill", "1", "--check", "none"]
    assert cli.main(line) == 0
    records = gptvq.Report.load(tmp_path / "learnt").layers
    assert gptvq.verify(tmp_path / "learnt").layers == len(records) and all(record.distilled for record in records)
    capsys.readouterr()
    assert cli.main(line) == 0 and "nothing to do" in capsys.readouterr().out
    assert cli.main([*line, "--method", "paper", "--overwrite"]) == 1 and "needs compensate" in capsys.readouterr().err


def test_what_it_cannot_take_is_told_before_it_learns():
    dense = build("gpt2")
    model = gptvq.quantize(copy.deepcopy(dense), None, preset("2d-2.25"), calibration=IDS).model
    most = dense.config.max_position_embeddings
    for tokens, options, message in ((torch.zeros(2, most + 1, dtype=torch.long), {}, f"the model's {most} positions"),
                                     (IDS + 10**6, {}, "vocabulary ends at"), (IDS.float(), {}, "need integers"),
                                     (IDS, {"batch": 0}, "batch: got 0")):
        with pytest.raises(gptvq.ConfigError, match=message):
            tune(model, dense, tokens, **options)


def test_weights_that_got_worse_are_not_kept(my_model, tmp_path, capsys, monkeypatch):
    """Too large a step, values that float16 cannot hold, a folder of save_pretrained, a full disk: exit code 1, and OUT holds nothing."""
    from gptvq import checkpoint, cli

    packed, text = tmp_path / "packed", my_model.parent / "calibration.txt"
    model = gptvq.quantize(my_model, packed, "2d-2.25-s64", calibration=text, samples=2, sequence_length=32, check=None).model
    learn = ["--calibration", str(text), "--samples", "4", "--sequence-length", "32", "--batch", "4", "--rate"]

    def run(folder, rate, dense=my_model):
        assert cli.main(["tune", str(folder), str(tmp_path / "tuned"), "--dense", str(dense), *learn, str(rate)]) == 1
        assert not (tmp_path / "tuned").exists() or not any((tmp_path / "tuned").iterdir())
        return capsys.readouterr().err

    assert "cannot be stored; try a smaller rate than 8.0" in run(packed, 8)
    assert "on the first step's samples rose from" in run(packed, 0.5)
    model.save_pretrained(tmp_path / "resaved")
    assert "no report.json of its own" in run(tmp_path / "resaved", 0.001, "no-such-model")
    (tmp_path / "resaved" / "report.json").write_bytes((packed / "report.json").read_bytes())
    assert "no report.json of its own" in run(tmp_path / "resaved", 0.001, "no-such-model")
    with pytest.raises(gptvq.ConfigError, match=r"no report\.json of its own"):
        gptvq.write_page(tmp_path / "resaved", tmp_path / "a.html")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: checkpoint.shutil._ntuple_diskusage(100, 90, 10))
    assert "the checkpoint needs" in run(packed, 0.001, "no-such-model")
