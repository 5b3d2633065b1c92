"""Unusable input: one clear error each, before any work, and nothing half-written."""
import errno
import os
import sys

import pytest
import torch
from job.tiny_models import build, preset
from torch import nn

import gptvq
from gptvq import (
    ConfigError,
    GptvqError,
    NumericalError,
    ResumeMismatch,
    checkpoint,
    stream,
)
from gptvq.report import Progress


class Untouched(nn.Module):
    """Stands for a model that must not be run: its refusal comes first."""

    def forward(self, ids):
        raise AssertionError("work was done before the check")


def refused(match, model=None, out=None, config="2d-2.25", error=ConfigError, **arguments):
    with pytest.raises(error, match=match) as caught:
        gptvq.quantize(build() if model is None else model, out, config, **arguments)
    assert isinstance(caught.value, GptvqError)
    return caught.value


def test_configurations(ids):
    refused("unknown preset", Untouched(), config="2d-9", calibration=ids)
    refused("need a VQConfig", Untouched(), config={"dim": 2}, calibration=ids)
    refused("device: got 'gpu9'", Untouched(), calibration=ids, device="gpu9")
    refused("dtype: got 'int4'", "/nowhere", calibration=ids, dtype="int4")
    refused("matches no layer", config=preset(rules=(("*.nothing", None),)), calibration=ids)
    refused("excluded by a rule", config=preset(rules=(("*", None),)), calibration=ids)
    refused("samples must be a positive integer", calibration="some text here", samples=0)
    refused("sequence_length must be a positive integer, got True", calibration="some text here", sequence_length=True)


def test_models(tmp_path, ids):
    refused("no such model", tmp_path / "nowhere", calibration=ids)
    refused("no such file", tmp_path / "model.gguf", calibration=ids)
    (tmp_path / "empty").mkdir()
    refused("no config.json", tmp_path / "empty", calibration=ids)
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").write_bytes(b"")
    refused("2 .gguf files", tmp_path / "two", calibration=ids)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{not json")
    refused("cannot load it", tmp_path / "odd", calibration=ids)


def test_models_without_blocks_or_linears(ids):
    class NoList(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(256, 8), nn.Linear(8, 256)

        def forward(self, ids):
            return self.head(self.embed(ids))

    class NoLinears(NoList):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    refused("no list of decoder blocks", NoList(), calibration=ids)
    refused("nothing to quantize: 0 linear layers", NoLinears(), calibration=ids)


def test_packed_models_are_not_quantized_again(tmp_path, ids):
    gptvq.quantize(build(), tmp_path / "once", preset(), calibration=ids)
    refused("already quantized", tmp_path / "once", calibration=ids)


def test_calibration(ids):
    refused("no tokenizer", calibration="a text without a tokenizer")
    refused("vocabulary ends at 255", calibration=ids + 1000)
    refused("need integers", calibration=ids.float())
    refused("longer than the model's 64 positions", calibration=torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj", "model.layers.0.input_layernorm", "model.embed_tokens", "model.norm",
                                   "lm_head"])
@pytest.mark.parametrize("in_files", [False, True])
def test_non_finite_weights_name_the_layer(bad, where, in_files, tmp_path, ids, monkeypatch):
    """Whatever is packed or not, and whether or not a calibration token meets it: before any work."""
    model = build()
    model.get_submodule(where).weight.data.view(-1)[3::7][:2] = bad
    if in_files:
        model.save_pretrained(tmp_path / "dense")
        model = tmp_path / "dense"
    monkeypatch.setattr(stream, "_CHUNK", 50)
    config = preset(rules=(("*.up_proj", None),))
    refused(f"{where}: the weight holds 2 non-finite", model, tmp_path / "out", calibration=ids, config=config, error=NumericalError)
    assert not (tmp_path / "out").exists()


def test_masks_of_minus_infinity_are_no_damage(ids):
    model = build()
    model.register_buffer("mask", torch.full((4, 4), float("-inf")))
    model.model.layers[0].register_buffer("mask", torch.full((4, 4), float("-inf")))
    assert len(gptvq.quantize(model, None, preset(), calibration=ids).layers) == 14


def test_non_finite_activations_name_the_block(ids):
    model, broken = build(), int(ids[3].max())
    model.model.layers[0].register_forward_hook(                                # the embedding's rows are told apart by their values
        lambda m, args, out, row=model.model.embed_tokens.weight.data[broken].clone(): out.masked_fill_(
            (args[0] == row).all(-1, keepdim=True), float("nan")) if isinstance(out, torch.Tensor) else None)
    first = next(i for i, sample in enumerate(ids) if broken in sample)
    refused(rf"model\.layers\.0: its output holds \d+ non-finite activations in calibration sample {first};", model, calibration=ids,
            config=preset(), error=NumericalError)
    model = build()
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: out.masked_fill((args[0] == ids[0, 9])[..., None], float("inf")))
    refused("embeddings: non-finite activations", model, calibration=ids, error=NumericalError)


def test_output_folders_are_checked_before_any_work(tmp_path, ids):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refused("not empty", Untouched(), tmp_path / "used", calibration=ids)
    refused("must be a folder", Untouched(), tmp_path / "used" / "notes.txt", calibration=ids)
    refused("cannot be written", Untouched(), tmp_path / "used" / "notes.txt" / "out", calibration=ids)
    assert os.listdir(tmp_path / "used") == ["notes.txt"]
    build().save_pretrained(tmp_path / "model")
    refused("model's own folder", tmp_path / "model", tmp_path / "model", calibration=ids, overwrite=True)
    refused("only Hugging Face models", Untouched(), tmp_path / "new", calibration=ids)
    assert not (tmp_path / "new").exists()


def test_a_read_only_folder(tmp_path, ids, monkeypatch):
    def mkdir(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)        # the tests may run as root, whom no permission stops
    refused("cannot be written .Permission denied", Untouched(), tmp_path / "out", calibration=ids)


def test_overwriting_replaces_a_checkpoint_and_nothing_else(tmp_path, ids):
    out = tmp_path / "out"
    gptvq.quantize(build(), out, preset("2d-4.125"), calibration=ids)
    (out / "notes.txt").write_text("mine")
    (out / "model-00002-of-00002.safetensors").write_bytes(b"left over")
    refused("config.index_bits was 4, is 2", Untouched(), out, calibration=ids, error=ResumeMismatch)
    refused("not empty", Untouched(), out, calibration=ids, resume="never")
    report = gptvq.quantize(build(), out, preset("2d-2.25"), calibration=ids, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and not (out / "model-00002-of-00002.safetensors").exists()
    loaded = gptvq.load(out, device="cpu")
    assert loaded.get_submodule(report.layers[0].name).spec.index_bits == 2


@pytest.mark.parametrize("fails_at", ["model.safetensors", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_full_disk_leaves_nothing_but_the_journal(fails_at, resume, tmp_path, ids, monkeypatch):
    def full(path):
        if os.path.basename(path) == fails_at:
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    out, replace = tmp_path / "out", os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: (full(b), replace(a, b)))
        error = refused("writing the checkpoint failed.*No space left", build(), out, calibration=ids, config=preset(), resume=resume)
    assert str(out) in str(error)
    assert (os.listdir(out) == ["journal"]) if resume == "auto" else not out.exists()
    monkeypatch.setattr(sys.modules["gptvq.quantize"], "solve", None if resume == "auto" else sys.modules["gptvq.quantize"].solve)
    assert len(gptvq.quantize(build(), out, preset(), calibration=ids, resume=resume).layers) == 14
    assert gptvq.load(out, device="cpu") is not None


def test_too_little_space_is_seen_before_solving(tmp_path, ids, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(sys.modules["gptvq.quantize"], "solve", None)
    refused("0 MB free", build(), tmp_path / "out", calibration=ids)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, ids):
    class Stops(Progress):
        def layer(self, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptvq.quantize(build(), tmp_path / "out", preset(), calibration=ids, progress=Stops())
    assert not (tmp_path / "out").exists()
