"""Which backend is taken where, what is said when Triton cannot be, and how configurations are chosen."""
import json
import re
from pathlib import Path

import pytest
import torch
from bench_runs import bench, check_file
from packed_cases import random_codes, random_tables

from bench import triton as bench_triton
from gptvq import BackendUnavailable, ConfigError, doctor, ops
from gptvq.backends import cuda, native, reference, triton, triton_launch
from gptvq.spec import QuantSpec
from gptvq.triton_kernels import configs

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("found, message", [("", "triton is not installed"), ("3.5.1", "triton 3.5.1 is too old: it needs 3.6 or newer"),
                                            ("3.6.0", "Triton kernels need a GPU"), ("3.10.0+git1", "Triton kernels need a GPU")])
def test_without_a_usable_triton(found, message, monkeypatch):
    monkeypatch.setattr(triton_launch, "version", lambda: found)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("GPTVQ_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match=f"GPTVQ_BACKEND=triton, but {message}.*; unset it to use another backend"):
        ops.backend(CPU)
    said = doctor.diagnose()["triton"]
    if not torch.cuda.is_available():
        assert said.startswith(f"{found or 'not installed'}; no kernels: ") and ("need a GPU" in message or message in said)
    monkeypatch.setenv("GPTVQ_BACKEND", "")
    assert ops.backend(CPU) in (native, reference)


def test_first_choice_on_each_device(monkeypatch):
    monkeypatch.delenv("GPTVQ_BACKEND", raising=False)
    for module in (native, triton, *(m for name, m in ops.BACKENDS.items() if name == "cuda")):
        monkeypatch.setattr(module, "serves", lambda device, module=module: (module is native) == (device.type == "cpu"))
    assert ops.backend(CPU) is native
    assert ops.backend(GPU) is ops.BACKENDS.get("cuda", triton)
    if "cuda" in ops.BACKENDS:
        monkeypatch.setattr(ops.BACKENDS["cuda"], "serves", lambda device: False)
    assert ops.backend(GPU) is triton
    monkeypatch.setattr(triton, "serves", lambda device: False)
    assert ops.backend(GPU) is reference
    monkeypatch.setenv("GPTVQ_BACKEND", "nonsense")
    with pytest.raises(BackendUnavailable, match="'nonsense' is unknown; choose one of native, .*triton"):
        ops.backend(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_machine_without_a_gpu(device):
    assert "no GPU" in triton.why_not(GPU) and "'meta'" in triton.why_not(torch.device("meta"))


def test_every_operator_is_there_and_the_table_of_backends_says_whose_it_is():
    """docs/backends.md, row by row: kernels of CUDA's and Triton's own where it says so, else PyTorch's."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w ]+?) \| ([\w ]+?) \|$", (ROOT / "docs/backends.md").read_text(), flags=re.M)
    operators = {"matmul", "submatmul", "gram", "cross", "fit", "column_block", "descent_block", "decode", "collect", "pack_codes",
                 "unpack_codes", "dequantize", "linear"}
    assert {name for name, *_ in rows} == operators
    for name, by_cuda, by_triton in rows:
        assert (getattr(triton, name) is getattr(reference, name)) == (by_triton == "PyTorch"), name
        assert hasattr(cuda, name) and by_cuda in ("PyTorch", "CUDA") and by_triton in ("PyTorch", "Triton")


def weight(device):
    spec = QuantSpec(32, 64, 2, 2, 16, 32)
    return [t if t is None else t.to(device) for t in (reference.pack_codes(random_codes(spec), spec), *random_tables(spec))], spec


def test_measured_configurations_are_kept(device, tmp_path, monkeypatch):
    """The first launch measures and writes, later ones and other processes read, and results stay right."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(triton_launch.TUNE, str(path))
    monkeypatch.setattr(triton_launch, "_seconds", lambda config, run, device: (run(config), -config.blocks[1][1])[1])
    tensors, spec = weight(device)
    x = torch.randn(1, 64, device=device)
    used = []
    monkeypatch.setattr(triton_launch, "start", lambda *args, start=triton_launch.start: (used.append(args[-1]), start(*args)))
    y = triton.linear(x, *tensors, None, spec, "a16")
    torch.testing.assert_close(y, reference.linear(x, *tensors, None, spec, "a16"), rtol=1e-4, atol=1e-5)
    options = configs.candidates("vq_gemv M=1", triton_launch.architecture(device))
    best = max(options, key=lambda config: config.blocks[1][1])
    assert used == [*options, best] and best != options[0]
    (known,) = json.loads(path.read_text()).values()
    assert [(key.startswith("vq_gemv M=1 (32, 64,"), value) for key, value in known.items()] == [(True, str(best))]
    used.clear()
    triton_launch._choices.cache_clear()                # as a new process
    triton.linear(x, *tensors, None, spec, "a16")
    assert used == [best]
    path.write_text("[1]")
    triton_launch._choices.cache_clear()
    with pytest.raises(ConfigError, match="tuned.json: not a file of configurations"):
        triton.linear(x, *tensors, None, spec, "a16")
    monkeypatch.setenv(triton_launch.TUNE, str(tmp_path / "no" / "such.json"))
    with pytest.raises(ConfigError, match="such.json: cannot be written"):
        triton.linear(x, *tensors, None, spec, "a16")


def test_time_of_a_configuration(device):
    calls = []
    assert 0 < triton_launch._seconds("config", calls.append, device, repeats=3) < 1 and calls == ["config"] * 4


def test_bench(device, tmp_path, capsys):
    out = tmp_path / "triton.json"
    assert bench(bench_triton, "--device", device.type, "--shapes", "32x64", "--presets", "2d-2.25", "--m", "1,9", "--repeats", "1",
                 "--backends", "triton,reference", "--json", out) == 0
    rows = check_file(out, "triton")
    assert [(r["operation"], r["method"], r.get("m")) for r in rows] == [
        *((name, backend, None) for name in ("fit", "column_block") for backend in ("triton", "reference")),
        *(("linear", name, m) for m in (1, 9) for name in ("triton", "reference", "torch", "copy"))]
    assert all(r["median_seconds"] > 0 and (r["gb_per_second"] > 0 if "m" in r else True) for r in rows)
    capsys.readouterr()
    assert bench(bench_triton, "--configs") == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in configs.TABLE) and str(configs.default("vq_gemv M=1", "sm_90")) in printed


def test_bench_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(triton_launch, "version", lambda: "")
    assert bench(bench_triton, "--device", "cuda") == 1
    assert "triton is not installed" in capsys.readouterr().err
