"""What the journal refuses, what it repairs, and what it leaves behind."""
import dataclasses
import errno
import json
import os
import shutil
import sys

import pytest
import torch
from job.tiny_models import QUICK, build, preset
from safetensors.torch import load_file, save_file

import gptvq
from gptvq import ConfigError, FormatError, ResumeMismatch, journal, machine
from gptvq.report import Progress


class Stops(Progress):
    """Interrupts a run in the block with this number."""

    def __init__(self, block):
        self.at, self.said = block, []

    def block(self, index, name):
        self.said.append(index)
        if index == self.at:
            raise KeyboardInterrupt

    def stage(self, text):
        self.said.append(text)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A job of which one block of two is done, in a folder and from a folder."""
    place = tmp_path_factory.mktemp("begun")
    build().save_pretrained(place / "model")
    with pytest.raises(KeyboardInterrupt):
        go(place / "model", place / "out", Stops(1))
    return place


@pytest.fixture
def job(begun, tmp_path):
    """(model, out): a copy of it."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy" / "model", tmp_path / "copy" / "out"


def go(model, out, progress=None, config=None, calibration=None, **arguments):
    ids = torch.arange(64).view(2, 32) if calibration is None else calibration
    return gptvq.quantize(model, out, config or preset(), calibration=ids, progress=progress, **arguments)


def refused(job, *parts, error=ResumeMismatch, **arguments):
    before = {path: path.read_bytes() for path in job[1].rglob("*") if path.is_file()}
    with pytest.raises(error) as caught:
        go(*job, **arguments)
    assert all(part in str(caught.value) for part in (str(job[1]), *parts)), caught.value
    assert before == {path: path.read_bytes() for path in job[1].rglob("*") if path.is_file()}


def test_what_is_on_the_disk(job):
    assert sorted(os.listdir(job[1])) == ["journal"]
    assert sorted(os.listdir(job[1] / "journal")) == ["block-00000.safetensors", "dense-00000.safetensors", "hidden-00000.safetensors",
                                                      "journal.jsonl", "lock"]
    first, block = map(json.loads, (job[1] / "journal" / "journal.jsonl").read_text().splitlines())
    assert set(first["job"]) == {"model", "config", "device", "layout", "chunks", "versions", "calibration", "redo"}
    assert (block["block"], block["name"], len(block["layers"])) == (0, "model.layers.0", 7)
    for name, about in block["files"].items():
        assert os.path.getsize(job[1] / "journal" / name) == about["bytes"]


def test_the_same_job_goes_on(job, monkeypatch):
    progress = Stops(None)
    solved = []
    module = sys.modules["gptvq.quantize"]
    solve = module.solve
    monkeypatch.setattr(module, "solve", lambda *args: (solved.append(args[4]), solve(*args))[1])
    report = go(*job, progress)
    assert any("1 of 2 blocks of this job are done" in str(text) for text in progress.said) and 0 not in progress.said
    assert len(solved) == 7 and all(".layers.1." in name for name in solved) and len(report.layers) == 14
    progress = Stops(None)
    again = go(*job, progress)
    assert any("is complete" in str(text) for text in progress.said) and len(solved) == 7
    assert again.to_dict()["layers"] == report.to_dict()["layers"]
    assert again.model.generate(torch.ones(1, 2).long(), max_new_tokens=1).shape == (1, 3)


FIELDS = {
    "config.index_bits": dict(config=preset("2d-3.125")),
    "config.recipe.damp": dict(config=gptvq.VQConfig.preset("2d-2.25", recipe=dataclasses.replace(QUICK, damp=0.02))),
    "config.recipe.ridge": dict(config=gptvq.VQConfig.preset("2d-2.25", recipe=dataclasses.replace(QUICK, ridge=0.2))),
    "config.rules": dict(config=preset(rules=(("*.down_proj", None),))),
    "config.seed": dict(config=preset(seed=1)),
    "calibration.sha256": dict(calibration=torch.arange(1, 65).view(2, 32)),
    "calibration.samples": dict(calibration=torch.arange(96).view(3, 32)),
    "calibration.sequence_length": dict(calibration=torch.arange(32).view(2, 16)),
    "model.weights": dict(dtype="bfloat16"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_other_arguments_are_another_job(job, field):
    refused(job, f"{field} was ", ", is ", "--fresh", **FIELDS[field])


def test_other_versions_devices_and_layouts_are_another_job(job, monkeypatch):
    for name, value, says in (("versions", lambda: {**machine.versions(), "torch": "9.9"}, "versions.torch was"),
                              ("device_class", lambda device: "a toaster", 'is "a toaster"'),
                              ("LAYOUT_VERSION", 99, "layout was 1, is 99"), ("ranks.CHUNKS", 16, "chunks was 8, is 16")):
        with monkeypatch.context() as patch:
            patch.setattr(f"gptvq.job.{name}", value)
            refused(job, says)
    lines = job[1] / "journal" / "journal.jsonl"
    lines.write_text(lines.read_text().replace('"chunks":8,', "", 1))       # of a version that added up sample by sample
    refused(job, "chunks was null, is 8")


def test_another_model_is_another_job(job):
    model, _ = job
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(job, 'model.weights was "')
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-4}))
    refused(job, 'model.config was "')
    build("mistral").save_pretrained(model)
    refused(job, 'model.class was "LlamaForCausalLM", is "MistralForCausalLM"')


def test_starting_over(job):
    with pytest.raises(KeyboardInterrupt):
        go(*job, Stops(1), config=preset("2d-3.125"), resume="fresh")
    assert journal.stored_job(job[1])["config"]["index_bits"] == 3
    with pytest.raises(KeyboardInterrupt):
        go(*job, Stops(1), config=preset("2d-4.125"), overwrite=True)
    assert journal.stored_job(job[1])["config"]["index_bits"] == 4
    progress = Stops(None)
    go(*job, progress, config=preset("2d-4.125"), overwrite=True)       # an unfinished run of the same job is not thrown away
    assert 0 not in progress.said and sorted(os.listdir(job[1]))[0] == "config.json"


def test_starting_over_where_the_report_is_damaged(job, tmp_path):
    go(*job)
    (job[1] / "report.json").write_text("{")
    with pytest.raises(FormatError, match="report.json"):
        go(*job)
    assert len(go(*job, resume="fresh").layers) == 14 and len(gptvq.Report.load(job[1]).layers) == 14
    shutil.copytree(job[0], tmp_path / "foreign")           # another program's model and report
    (tmp_path / "foreign" / "report.json").write_text("{")
    with pytest.raises(ConfigError, match="not empty"):
        go(job[0], tmp_path / "foreign", resume="fresh")


def test_without_a_journal(job):
    refused(job, "not empty", error=ConfigError, resume="never")
    with pytest.raises(KeyboardInterrupt):
        go(job[0], job[1].parent / "other", Stops(1), resume="never")
    assert not (job[1].parent / "other").exists()
    assert len(go(*job, resume="never", overwrite=True).layers) == 14 and not (job[1] / "journal").exists()


@pytest.mark.parametrize("torn", [b'{"block": 1, "na', b"\0\0\0\0", b'{"block": 1}x\n'])
def test_a_torn_last_line_is_dropped(job, torn):
    with open(job[1] / "journal" / "journal.jsonl", "ab") as file:
        file.write(torn)
    (job[1] / "journal" / "block-00001.safetensors").write_bytes(b"of a block that was never finished")
    progress = Stops(None)
    assert len(go(*job, progress).layers) == 14 and progress.said.count(1) == 1


@pytest.mark.parametrize("file", ["block-00000.safetensors", "hidden-00000.safetensors", "dense-00000.safetensors"])
def test_damaged_files_are_named(job, file):
    path = job[1] / "journal" / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(job, file, "not what was written", error=FormatError)
    path.unlink()
    refused(job, file, "missing", error=FormatError)


@pytest.mark.parametrize("change, says", [
    (lambda lines: [b"{}"] + lines[1:], "names no job"), (lambda lines: [lines[0], b"nonsense", lines[1]], "line 2 is not valid JSON"),
    (lambda lines: [lines[0], lines[1], lines[1]], "not one per block"), (lambda lines: [b"[]", lines[1]], "line 1: got a list"),
    (lambda lines: [lines[0], lines[1].replace(b'"layers"', b'"leyers"')], "not one per block")])
def test_damaged_lines_are_named(job, change, says):
    path = job[1] / "journal" / "journal.jsonl"
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    refused(job, says, "start over", error=FormatError)


def test_a_folder_that_turned_read_only(job, monkeypatch):
    """Root may write everywhere, so the system's answer is put in its place."""
    opened = os.open

    def read_only(path, flags, *more, **named):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(job[1])):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        refused(job, "cannot be written (Read-only file system)", "run the same command again", error=ConfigError)
    assert len(go(*job).layers) == 14


def test_what_is_on_the_disk_before_what(tmp_path, monkeypatch):
    """A file is written, synced and only then named; the folder is synced, then the line that names the file."""
    book, seen = journal.Journal(tmp_path, {"a": 1}), []

    def note(name, place):
        call = getattr(os, name)

        def noted(*args):
            seen.append((name, place(args[0])))
            return call(*args)
        monkeypatch.setattr(os, name, noted)

    for name in ("write", "fsync"):
        note(name, lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
    note("replace", os.path.basename)
    monkeypatch.setattr(journal, "unlink", lambda paths: seen.extend(("unlink", path.name) for path in paths))
    (book.folder / "hidden-00009.safetensors").touch()
    book.commit({"block": 0, "layers": [], "warnings": [], "seconds": 0, "stages": {}}, {"x": torch.ones(3)}, {"hidden": [torch.ones(2)]})
    book.close()
    steps = [step for i, step in enumerate(seen) if i == 0 or step != seen[i - 1]]
    files = [[(step, f"{kind}-00000.safetensors.partial") for step in ("write", "fsync", "replace")] for kind in ("block", "hidden")]
    assert [[step for step in steps if step[1].startswith(kind) and step[0] != "unlink"] for kind in ("block", "hidden-00000")] == files
    assert steps[-4:] == [("fsync", "journal"), ("write", "journal.jsonl"), ("fsync", "journal.jsonl"),
                          ("unlink", "hidden-00009.safetensors")]
    assert len(steps) == 10


def test_the_job_may_move(job, tmp_path):
    shutil.move(job[1], tmp_path / "elsewhere")
    shutil.move(job[0], tmp_path / "model too")
    progress = Stops(None)
    go(tmp_path / "model too", tmp_path / "elsewhere", progress)
    assert 0 not in progress.said
