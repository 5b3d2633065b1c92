"""Layers of a finished checkpoint done again: the blocks before them stay as they are, to the byte."""
import errno
import json
import shutil
import sys

import pytest
import torch
from job.tiny_models import build, preset
from safetensors.torch import load_file, save_file

import gptvq
from gptvq import ConfigError, FormatError, ResumeMismatch, checkpoint, storage
from gptvq.redo import _matching
from gptvq.report import Progress


class Stops(Progress):
    def block(self, index, name):
        if index == 1:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("finished")
    build().save_pretrained(place / "model")
    gptvq.quantize(place / "model", place / "out", preset(), calibration=few())
    return place


@pytest.fixture
def job(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy" / "model", tmp_path / "copy" / "out"


def few():
    return torch.arange(64).view(2, 32)


def more():
    return torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(1))


def redo(job, pattern, calibration=None, config=None, **arguments):
    return gptvq.quantize(*job, config or preset(), calibration=more() if calibration is None else calibration, redo=pattern, **arguments)


@pytest.mark.parametrize("source", ["folder", "module"])
def test_earlier_blocks_stay_and_later_ones_are_new(job, source, monkeypatch):
    before = load_file(job[1] / "model.safetensors")
    solved, module = [], sys.modules["gptvq.quantize"]
    solve = module.solve
    monkeypatch.setattr(module, "solve", lambda *args: (solved.append(args[4]), solve(*args))[1])
    report = redo((build() if source == "module" else job[0], job[1]), "layers.1.mlp.*")
    after = load_file(job[1] / "model.safetensors")
    assert len(solved) == 7 and all(name.startswith("model.layers.1.") for name in solved)
    assert all(torch.equal(after[name], before[name]) for name in before if ".layers.0." in name)
    assert not torch.equal(after["model.layers.1.mlp.up_proj.idx"], before["model.layers.1.mlp.up_proj.idx"])
    assert report.redone["from"] == "model.layers.1" and report.redone["calibration"]["before"]["samples"] == 2
    assert report.calibration["samples"] == 6 and gptvq.Report.load(job[1]).redone == report.redone
    assert torch.equal(report.model(few()).logits, gptvq.load(job[1], device="cpu")(few()).logits)
    redo(job, "layers.1.mlp.*")                         # the same again is complete
    assert len(solved) == 7
    redo(job, "layers.1.mlp.*", few())
    assert len(solved) == 14


def test_progress_counts_what_is_done_again(job):
    progress, started = Progress(), []
    progress.start = lambda weights, blocks: started.append(weights)
    report = redo(job, "layers.1.mlp.*", progress=progress)
    assert started == [sum(r.rows * r.cols for r in report.layers if ".layers.1." in r.name)]


def test_later_blocks_see_the_new_calibration(job):
    """As a run would that solved the first block on the old text and the second on the new one."""
    assert redo(job, "*.0.*").redone["from"] == "model.layers.0"
    gptvq.quantize(job[0], job[1].parent / "whole", preset(), calibration=more())
    assert (job[1] / "model.safetensors").read_bytes() == (job[1].parent / "whole" / "model.safetensors").read_bytes()


def test_an_interrupted_one_leaves_the_old_checkpoint_and_goes_on(job):
    whole = job[1].parent / "whole"
    shutil.copytree(job[1], whole)
    redo((job[0], whole), "layers.1.*")
    old = (job[1] / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        redo(job, "layers.1.*", progress=Stops())
    assert (job[1] / "model.safetensors").read_bytes() == old and gptvq.load(job[1], device="cpu") is not None
    with pytest.raises(ResumeMismatch, match="redo"):
        gptvq.quantize(*job, preset(), calibration=few())
    redo(job, "layers.1.*")
    for name in ("model.safetensors", "report.json", "config.json"):
        assert (job[1] / name).read_bytes() == (whole / name).read_bytes()


def test_the_format_of_what_is_redone_may_change(job):
    report = redo(job, "layers.1.*", config=preset(rules=(("*.layers.1.*", "2d-3.125"),)))
    assert {r.spec.index_bits for r in report.layers if ".layers.1." in r.name} == {3}
    with pytest.raises(ResumeMismatch, match=r"model\.layers\.0\.\S+: its format was .* before model.layers.1, the first to redo"):
        redo(job, "layers.1.*", config=preset("2d-3.125"))


@pytest.mark.parametrize("kept, pattern, name", [("*.layers.0.mlp.*", "layers.1.*", r"layers\.0\.mlp\.down_proj"),
                                                 ("*.layers.0.*", "layers.1.mlp.*", r"layers\.0\.mlp\.down_proj")])
def test_what_a_rule_left_dense_stays_so_before_the_first(kept, pattern, name, job):
    gptvq.quantize(*job, preset(rules=((kept, None),)), calibration=few(), resume="fresh")
    before = load_file(job[1] / "model.safetensors")
    with pytest.raises(ResumeMismatch, match=rf"{name}: its format was dense, is .* or redo 'model.layers.0.\*' as well"):
        redo(job, pattern)
    report = redo(job, pattern, config=preset(rules=((kept, None),)))
    after = load_file(job[1] / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before if ".layers.0." in key)
    assert report.redone["from"] == "model.layers.1"
    assert len(redo(job, "model.layers.0.*").layers) == 14


def test_linears_never_called_stay_dense(job):
    def odd():
        model = build()
        model.model.layers[0].mlp.spare = torch.nn.Linear(64, 64)
        return model

    gptvq.quantize(odd(), job[1], preset(), calibration=few(), resume="fresh", check=None)
    report = gptvq.quantize(odd(), job[1], preset(), calibration=more(), redo="layers.1.*", check=None)
    assert report.redone["from"] == "model.layers.1" and len(report.layers) == 14


def test_another_recipe_is_told(job):
    report = redo(job, "layers.1.*", config=gptvq.VQConfig.preset("2d-2.25", recipe=gptvq.Recipe.paper(em_iterations=5)))
    assert report.redone["recipe"]["method"] == "gptvq" and report.config.recipe.method == "paper"
    assert "recipe" not in redo(job, "layers.0.*").redone


def test_weak_layers():
    class Record:
        def __init__(self, name, error):
            self.name, self.error = name, error

    layers = [Record(f"model.layers.{i}.mlp.{kind}", error) for i in range(5)
              for kind, error in (("up", 0.1 + (i == 3)), ("down", 0.5 + 0.1 * i))]
    assert _matching("weak", layers) == ["model.layers.3.mlp.up"]


def test_what_cannot_be_redone(job, tmp_path):
    for pattern, says in (("layers.7.*", "matches no quantized layer"), ("weak", "over 2 times the median")):
        with pytest.raises(ConfigError, match=says):
            redo(job, pattern)
    with pytest.raises(ConfigError, match="only layers of a finished checkpoint"):
        redo((job[0], tmp_path / "new"), "layers.1.*")
    with pytest.raises(ConfigError, match="redo: got out=None, need the folder"):
        redo((build(), None), "layers.1.*")
    with pytest.raises(ConfigError, match="journal"):
        redo(job, "layers.1.*", resume="never")
    with pytest.raises(ResumeMismatch, match="model.weights was"):
        redo(job, "layers.1.*", dtype="bfloat16")
    shutil.copytree(job[1], tmp_path / "tuned")
    report = json.loads((job[1] / "report.json").read_text())
    (tmp_path / "tuned/report.json").write_text(json.dumps({**report, "job": {}}))
    with pytest.raises(ConfigError, match="tuned: .* is not as quantizing left it .*; quantize again"):
        redo((job[0], tmp_path / "tuned"), "layers.1.*")
    tensors = load_file(job[1] / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.idx"][0, 0, 0] ^= 1
    save_file(tensors, job[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="model.layers.0.mlp.up_proj is not what was written"):
        redo(job, "layers.1.*")


@pytest.mark.parametrize("at", [checkpoint.WHOLE, checkpoint.INDEX, "generation_config.json", checkpoint.CONFIG])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("pattern", ["layers.1.*", "lm_head"])
def test_what_was_before_the_blocks_outlives_the_checkpoint_that_is_replaced(name, pattern, at, tmp_path, monkeypatch):
    """Once more after the disk was full at any file: the journal alone has the embedding then, or the head that is one too."""
    if (name, pattern) == ("llama-tied", "lm_head"):
        pytest.skip("begins with the first block")
    build(name).save_pretrained(tmp_path / "model")
    config, seal = preset(head="2d-2.25"), storage.DurableFile.seal
    gptvq.quantize(tmp_path / "model", tmp_path / "out", config, calibration=few(), check=None)
    shutil.copytree(tmp_path / "out", tmp_path / "want")
    redo((tmp_path / "model", tmp_path / "want"), pattern, config=config, check=None)

    def full(file):
        if file.path == tmp_path / "out" / at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return seal(file)

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="run the same command again"):
        patch.setattr(storage.DurableFile, "seal", full)
        redo((tmp_path / "model", tmp_path / "out"), pattern, config=config, check=None)
    assert not (tmp_path / "out" / checkpoint.REPORT).exists()
    redo((tmp_path / "model", tmp_path / "out"), pattern, config=config, check=None)
    for file in (checkpoint.WHOLE, checkpoint.REPORT, checkpoint.CONFIG):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "want" / file).read_bytes(), file


def test_a_kept_embedding_that_is_gone_is_not_made_anew(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    config, job = preset(head="2d-2.25"), (tmp_path / "model", tmp_path / "out")
    gptvq.quantize(*job, config, calibration=few(), check=None)
    with pytest.raises(KeyboardInterrupt):
        redo(job, "layers.1.*", config=config, check=None, progress=Stops())
    lines = job[1] / "journal" / "journal.jsonl"
    first, block = map(json.loads, lines.read_text().splitlines())
    del block["front"]
    lines.write_text("".join(json.dumps(line) + "\n" for line in (first, block)))
    (job[1] / checkpoint.REPORT).unlink()
    with pytest.raises(FormatError, match="model.embed_tokens, which this run keeps, is gone; start over"):
        redo(job, "layers.1.*", config=config, check=None)
