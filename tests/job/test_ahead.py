"""The next block read on a thread while the one before is worked on: the same bytes, in the right order, nothing left behind."""
import importlib
import threading

import pytest
import torch
from job.tiny_models import build, preset

import gptvq
from gptvq import FormatError, ahead, parts, stream
from gptvq.ahead import ReadAhead, locked_bytes
from gptvq.storage import digest

CPU = torch.device("cpu")
quantize, planning = (importlib.import_module(f"gptvq.{name}") for name in ("quantize", "plan"))     # not the functions


def reading():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gptvq reads")]


@pytest.fixture
def forced(monkeypatch):
    """Reads ahead on this machine's CPU as if it were a GPU; a list of what happened in which order."""
    events = []

    def logged(owner, name, label):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **named: (events.append(label(*args)), function(*args, **named))[1])

    monkeypatch.setattr(stream, "reads_ahead", lambda of, device: of.streamed)
    logged(ReadAhead, "start", lambda self, name, *_: f"start {name}")
    logged(ReadAhead, "take", lambda self, name: f"take {name}")
    logged(parts, "read_block", lambda folder, dtype, name: f"read {name}")
    logged(quantize, "solve", lambda *args: f"solve {args[4]}")
    return events


def worked(events):
    """From the first block's turn on."""
    return events[next(i for i, e in enumerate(events) if e.startswith("take")):]


@pytest.mark.parametrize("name, dtype, by_name", [("llama", torch.float32, True), ("llama", torch.bfloat16, True), ("gpt2", torch.float32, None),
                                                ("mixtral", torch.float32, None)])
def test_the_same_bytes_and_one_block_ahead(name, dtype, by_name, tmp_path, ids, forced, monkeypatch):
    build(name, dtype).save_pretrained(tmp_path / "dense")
    gptvq.quantize(tmp_path / "dense", tmp_path / "ahead", preset(), calibration=ids)
    events = worked(forced)
    if by_name:
        first, second = "model.layers.0", "model.layers.1"
        assert events[:3] == [f"take {first}", f"read {first}", f"start {second}"] and f"read {second}" not in events
        taken = events.index(f"take {second}")
        assert all(e.startswith(f"solve {first}.") for e in events[3:taken]) and taken > 3
    monkeypatch.setattr(stream, "reads_ahead", lambda of, device: False)
    gptvq.quantize(tmp_path / "dense", tmp_path / "plain", preset(), calibration=ids)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ahead" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert not reading()


def test_a_cpu_reads_nothing_ahead(folder, ids, monkeypatch):
    monkeypatch.setattr(stream, "ReadAhead", None)
    gptvq.quantize(folder, None, preset(), calibration=ids)


def reader(folder):
    module = parts.read_block(folder, "auto", "model.layers.1")
    values = module.state_dict(prefix="model.layers.1.")
    return ReadAhead(folder, {name: digest(t) for name, t in values.items()}, CPU), values, module.to("meta").state_dict(
        prefix="model.layers.1.")


def test_what_is_taken(folder):
    found, values, wanted = reader(folder)
    values = dict(parts.read_block(folder, "auto", "model.layers.1").state_dict(prefix="model.layers.1."))
    assert found.readable(wanted) and not found.readable({**wanted, "other": wanted[next(iter(wanted))]})
    assert not found.readable({name: t[:1] for name, t in wanted.items()})
    assert found.take("model.layers.1") is None                 # nothing was begun
    for _ in range(2):
        found.start("model.layers.1", wanted, True)
        assert found.take("model.layers.0") is None
        taken = found.take("model.layers.1")
        assert taken.keys() == values.keys() and all(torch.equal(taken[name], t) for name, t in values.items())
    found.start("model.layers.1", wanted, True)
    found.close()
    assert found.take("model.layers.1") is None and not reading()
    found._hashes = {name: "another" for name in found._hashes}
    found.start("model.layers.1", wanted, True)
    assert found.take("model.layers.1") is None and not found.readable(wanted)


def test_errors_of_the_thread_are_raised_where_the_block_is_taken(folder, monkeypatch):
    found, _, wanted = reader(folder)

    def broken(self, name, meta):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ReadAhead, "_read", broken)
    found.start("model.layers.1", wanted, True)
    with pytest.raises(FormatError, match=r"model.safetensors: model.layers.1\S+ cannot be read \(Input/output error\); copy it again"):
        found.take("model.layers.1")
    assert not reading()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_no_thread(folder, ids, forced, error, monkeypatch):
    begun, seen = threading.Event(), threading.Event()

    def slow(self, name, meta):
        begun.set()
        seen.wait(20)
        threading.Event().wait(0.05)
        return torch.zeros(meta.shape, dtype=meta.dtype)

    def interrupted(*args):
        assert begun.wait(20) and reading()
        seen.set()
        raise error

    monkeypatch.setattr(ReadAhead, "_read", slow)
    monkeypatch.setattr(ahead, "digest", lambda tensor: "")
    monkeypatch.setattr(quantize, "solve", interrupted)
    with pytest.raises(error):
        gptvq.quantize(folder, None, preset(), calibration=ids)
    assert not reading()


def test_memory_is_predicted(folder, ids, forced, monkeypatch):
    tensors = parts.read_block(folder, "auto", "model.layers.1").state_dict()
    exact = sum(t.numel() * t.element_size() for t in tensors.values())
    assert exact <= locked_bytes(tensors) < 2 * exact + 512 * len(tensors)
    monkeypatch.setattr(planning, "resident_memory", lambda reset=False: stream_memory)
    stream_memory = type("Memory", (), {"now": 0, "peak": 10 ** 9})()
    monkeypatch.setattr(planning, "reads_ahead", lambda of, device: False)
    without = gptvq.plan(folder, preset(), calibration=ids).peak_ram
    monkeypatch.setattr(planning, "reads_ahead", lambda of, device: True)
    assert gptvq.plan(folder, preset(), calibration=ids).peak_ram - without == locked_bytes(tensors)


@pytest.mark.gpu
def test_the_same_bytes_on_a_gpu(folder, tmp_path, ids, monkeypatch):
    taken, take = [], ReadAhead.take
    monkeypatch.setattr(ReadAhead, "take", lambda self, name: taken.append(take(self, name)) or taken[-1])
    gptvq.quantize(folder, tmp_path / "ahead", preset(), calibration=ids, device="cuda")
    assert all(t.device.type == "cuda" for t in taken[-1].values())
    monkeypatch.setattr(stream, "reads_ahead", lambda of, device: False)
    gptvq.quantize(folder, tmp_path / "plain", preset(), calibration=ids, device="cuda")
    assert (tmp_path / "ahead" / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
