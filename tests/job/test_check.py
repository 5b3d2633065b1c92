"""After saving: how far the checkpoint is from the dense model.  And what strict turns into errors, one test per fallback."""
import json

import pytest
import torch
from job.tiny_models import build, logits, preset
from torch import nn
from transformers import AutoModelForCausalLM

import gptvq
from gptvq import GptvqError
from gptvq.backends import native
from gptvq.calibration import calibration_windows
from gptvq.report import Progress


TEXT = "".join(chr(97 + i * 7 % 26) + str(i * i) + " " for i in range(120))


class Letters:
    """A tokenizer with one token per byte."""

    def __call__(self, text, add_special_tokens=False, verbose=False):
        return {"input_ids": list(text.encode())}

    def save_pretrained(self, folder):
        (folder / "letters.txt").write_text("one token per byte")


@pytest.fixture
def dense(tmp_path):
    build().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def kl_by_hand(dense, packed, tokens):
    """Mean over positions of sum_v p (log p - log q), in float64."""
    p, q = (logits(model, tokens).double().log_softmax(-1) for model in (dense, packed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("source", ["folder", "module"])
def test_divergence_is_that_of_the_files(source, dense, tmp_path, ids):
    held_out = torch.randint(0, 256, (3, 40))
    report = gptvq.quantize(dense if source == "folder" else build(), tmp_path / "out", preset(), calibration=ids, check=held_out)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.check["kl"] == pytest.approx(kl_by_hand(build(), packed, held_out), rel=1e-4)
    assert report.check["tokens"] == 120 and gptvq.Report.load(tmp_path / "out").check == report.check
    same = logits(build(), held_out).argmax(-1) == logits(packed, held_out).argmax(-1)
    assert report.check["same_token"] == pytest.approx(float(same.float().mean()), abs=0.02)
    finer = gptvq.quantize(dense, tmp_path / "finer", preset("2d-4.125"), calibration=ids, check=held_out)
    assert 0 < finer.check["kl"] < report.check["kl"] / 4


@pytest.mark.parametrize("source", ["folder", "module"])
@pytest.mark.parametrize("at", ["running the quantized block", "reading the checkpoint back"])
def test_the_check_of_an_interrupted_run(source, at, dense, tmp_path, ids):
    """Whether it ended in the last block or before the check: the dense model is compared, and all is as without the interrupt."""
    class Stops(Progress):
        seen = 0

        def stage(self, text):
            self.seen += text.startswith(at)
            if self.seen == (2 if at.startswith("running") else 1) and text.startswith(at):
                raise KeyboardInterrupt

    def go(out, **arguments):
        model = dense if source == "folder" else build()
        return gptvq.quantize(model, tmp_path / out, preset(), calibration=ids, check=ids[:, :20], **arguments)

    with pytest.raises(KeyboardInterrupt):
        go("out", progress=Stops())
    assert (tmp_path / "out" / "journal").exists() == at.startswith("running")
    go("whole")
    report = go("out")
    assert report.check["kl"] > 0
    for name in ("report.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_unused_text_is_the_end_that_no_window_touches():
    tokens, held_out = calibration_windows(TEXT, Letters(), 5, 16, 0)
    windows = {tuple(row.tolist()) for row in tokens}
    assert held_out.shape == (4, 16) and not windows & {tuple(row.tolist()) for row in held_out}
    last = Letters()(TEXT, False, False)["input_ids"]
    last = [tuple(last[s: s + 16]) for s in range(0, len(last) - 15, 16)]
    assert [tuple(row.tolist()) for row in held_out] == [w for w in last if w not in windows][-4:]
    assert calibration_windows(TEXT[:100], Letters(), 3, 90, 0)[1] is None            # overlapping windows to the end
    assert calibration_windows(torch.zeros(2, 8).long(), None, 1, 1, 0)[1] is None


def test_text_is_checked_by_itself(dense, tmp_path):
    arguments = dict(calibration=TEXT, samples=4, sequence_length=32, tokenizer=Letters())
    report = gptvq.quantize(dense, tmp_path / "out", preset(), **arguments)
    assert report.check["tokens"] == 4 * 32 and report.check["kl"] > 0 and not report.warnings
    without = gptvq.quantize(dense, tmp_path / "without", preset(), check=None, **arguments)
    assert without.check == {}
    named = gptvq.quantize(dense, tmp_path / "named", preset(), check=TEXT[:50], **arguments)
    assert named.check["tokens"] == 32 and named.check["kl"] != report.check["kl"]


# ---- strict
def both(match, model, out, config=None, **arguments):
    """What is a warning, or a repair, without strict; and the same as an error with it."""
    with pytest.raises(GptvqError, match=f"{match}.*because of strict"):
        gptvq.quantize(model(), out, config or preset(), strict=True, **arguments)
    return gptvq.quantize(model(), out, config or preset(), **arguments)


def test_strict_lets_a_clean_run_pass(tmp_path, ids):
    assert not gptvq.quantize(build(), tmp_path / "out", preset(), calibration=ids, strict=True).warnings


@pytest.mark.filterwarnings("ignore:the reference serves the CPU")
def test_a_missing_build(tmp_path, ids, monkeypatch):
    monkeypatch.delenv("GPTVQ_BACKEND", raising=False)
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_why", "cannot be imported (for a reason)")
    report = both("gptvq._C cannot be imported", build, tmp_path / "out", calibration=ids, device="cpu")
    assert [warning for warning in report.warnings if warning.startswith("the reference serves the CPU")] == report.warnings
    monkeypatch.setenv("GPTVQ_BACKEND", "reference")
    assert not gptvq.quantize(build(), None, preset(), calibration=ids, strict=True, device="cpu").warnings


def test_experts_without_tokens(tmp_path):
    ids = torch.zeros(2, 4, dtype=torch.long)
    report = both("(?:saw no calibration tokens|from other experts)", lambda: build("mixtral"), tmp_path / "out", calibration=ids)
    unseen = [r.name for r in report.layers if r.tokens == 0]
    assert unseen and all(any(w.startswith(name) for w in report.warnings) for name in unseen)


def test_linears_that_are_never_called(tmp_path, ids):
    def model():
        found = build()
        found.model.layers[1].mlp.idle = nn.Linear(64, 64)
        return found

    report = both("never called", model, None, calibration=ids)
    assert any("idle: never called in the calibration runs, left dense" in w for w in report.warnings)


def test_experts_in_a_form_not_known(ids):
    def model():
        found = build("mixtral")
        for layer in found.model.layers:
            layer.mlp.experts.register_parameter("extra", nn.Parameter(torch.zeros(2, 2, 2)))
        return found

    assert any("a form not known" in w for w in both("a form not known", model, None, calibration=ids).warnings)


def test_hessians_that_need_a_repair(tmp_path):
    recipe = gptvq.Recipe(em_iterations=5, passes=1, sweeps=1, cg_iterations=3, damp=1e-12, shrink=0, ridge=0)
    config = gptvq.VQConfig.preset("2d-2.25", recipe=recipe)
    report = both("its Hessian took a repair", build, tmp_path / "out", config, calibration=torch.zeros(1, 4, dtype=torch.long))
    assert any(r.repair for r in report.layers)


def test_activations_left_out(tmp_path, ids, monkeypatch):
    from gptvq.hessian import Hessian
    add, seen = Hessian.add, []

    def one_bad(self, x):
        seen.append(x)
        add(self, torch.full_like(x[..., :1, :], float("nan")) if len(seen) == 1 else x)

    monkeypatch.setattr(Hessian, "add", one_bad)
    many = ids.repeat(8, 1)
    with pytest.raises(GptvqError, match="non-finite activations and were left out.*because of strict"):
        gptvq.quantize(build(), None, preset(), calibration=many, strict=True)
    seen.clear()
    report = gptvq.quantize(build(), None, preset(), calibration=many)
    assert [w for w in report.warnings if "were left out" in w] and "1 of" in report.warnings[0]


def test_no_text_left_to_check(dense, tmp_path):
    arguments = dict(calibration=TEXT[:100], samples=3, sequence_length=50, tokenizer=Letters())
    report = both("no calibration text was left over", lambda: dense, tmp_path / "out", **arguments)
    assert report.check == {} and len(report.warnings) == 1
    assert not gptvq.quantize(dense, tmp_path / "out2", preset(), check=None, strict=True, **arguments).warnings
    short = gptvq.quantize(dense, tmp_path / "out3", preset(), **{**arguments, "sequence_length": 1})
    assert len(short.warnings) == 1 and "sequences of 1 token leave nothing to predict" in short.warnings[0]


def test_warnings_of_an_interrupted_run_come_once(dense, tmp_path):
    class Stops(Progress):
        def block(self, index, name):
            if index == 1:
                raise KeyboardInterrupt

    arguments = dict(calibration=TEXT[:100], samples=3, sequence_length=50, tokenizer=Letters())
    with pytest.raises(KeyboardInterrupt):
        gptvq.quantize(dense, tmp_path / "out", preset(), progress=Stops(), **arguments)
    assert len(gptvq.quantize(dense, tmp_path / "out", preset(), **arguments).warnings) == 1
    gptvq.quantize(dense, tmp_path / "whole", preset(), **arguments)
    assert (tmp_path / "out" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()


def test_strict_also_minds_what_an_earlier_run_found(tmp_path):
    class Stops(Progress):
        def block(self, index, name):
            if index == 1:
                raise KeyboardInterrupt

    arguments = dict(calibration=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(KeyboardInterrupt):
        gptvq.quantize(build("mixtral"), tmp_path / "out", preset(), progress=Stops(), **arguments)
    line = json.loads((tmp_path / "out" / "journal" / "journal.jsonl").read_text().splitlines()[1])
    assert line["warnings"]
    with pytest.raises(GptvqError, match="because of strict"):
        gptvq.quantize(build("mixtral"), tmp_path / "out", preset(), strict=True, **arguments)
    assert gptvq.quantize(build("mixtral"), tmp_path / "out", preset(), **arguments).warnings
