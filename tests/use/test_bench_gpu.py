"""What the benches do on a GPU, tried out on the CPU with tiny sizes, so that the scripts do not rot where there is none."""
import os
import shutil
import subprocess
import tarfile

import pytest
import torch
from bench_runs import bench, check_file
from emulated_cuda import ROOT

from bench import decode, decode_gpu, decoder_layer, gemv, gemv_gpu, peers, quantize
from gptvq.config import VQConfig
from gptvq.errors import BackendUnavailable

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr("bench.device.RING_BYTES", 1 << 16)
    monkeypatch.setitem(decoder_layer.MODELS, "tiny", decoder_layer.llama(3, 64, 96, 32))
    monkeypatch.setitem(decode_gpu.MODELS, "tiny", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                                        num_key_value_heads=2, vocab_size=50))


def test_gemv(tmp_path, capsys):
    out = tmp_path / "gemv.json"
    options = ["--shapes", "32x256", "--presets", "2d-2.25,4d-2.25", "--activations", "a16", "--m", "1,3", "--repeats", "3",
               "--json", str(out)]
    args = gemv.parser().parse_args(options)
    rows = gemv_gpu.measure(args, options)
    assert check_file(out, "gemv") == rows and gemv.show(rows).count("\n") == 1 + len(rows)
    assert [(r["operation"], r["m"]) for r in rows if r["method"] == "gptvq"] == [("gemv", 1)] * 2 + [("gemm", 3)] * 2
    for row in rows:
        assert row["gb_per_second"] > 0 and row["of_copy"] > 0
    ours, copy = rows[0], next(r for r in rows if r["method"] == "copy")
    spec = VQConfig.preset("2d-2.25").spec(32, 256)
    assert ours["gb_per_second"] == pytest.approx(spec.nbytes / ours["median_seconds"] / 1e9)
    assert ours["of_copy"] == pytest.approx(ours["gb_per_second"] / copy["gb_per_second"])
    assert copy["gb_per_second"] == pytest.approx((1 << 16) / copy["median_seconds"] / 1e9)
    assert set(ours["speedup"]) == {"cublas fp16", "cublas bf16"} and "of copy" in gemv.show(rows)
    said = capsys.readouterr().err
    assert all(said.count(f"no rows of {name}: {name} runs on GPUs") == 1 for name in peers.PEERS)


def test_a_ring_is_rotated(monkeypatch):
    """Every product of a pass has its own weight, and is computed by itself."""
    seen = []
    monkeypatch.setattr(gemv_gpu, "Size", lambda *args, make=gemv_gpu.Size: seen.append(make(*args)) or seen[-1])
    args = gemv.parser().parse_args(["--shapes", "32x256", "--presets", "2d-2.25", "--activations", "a16", "--repeats", "1"])
    gemv_gpu.measure(args, [])
    assert seen[0].x.is_inference()
    monkeypatch.undo()
    monkeypatch.setattr("bench.device.RING_BYTES", 1 << 16)
    size = gemv_gpu.Size(32, 256, 1, torch.float32, CPU)
    packed, = size.packed("2d-2.25", ["fp32"])
    assert packed.calls * packed.nbytes >= 1 << 16 > (packed.calls - 1) * packed.nbytes
    assert size.cublas("cublas fp16").calls == 4


def test_a_peer_that_fails_is_named(monkeypatch):
    def broken(rows, cols, dtype, device):
        raise AttributeError("no Linear in this version")
    monkeypatch.setitem(peers.PEERS, "broken", broken)
    with pytest.raises(BackendUnavailable, match="broken: AttributeError: no Linear in this version"):
        peers.layer("broken", 8, 8, torch.float16, torch.device("cuda"))


@pytest.mark.parametrize("preset", ["2d-2.25", "1d-3.125-s64"])
def test_quantize_a_decoder_layer(preset, tmp_path, capsys):
    out = tmp_path / "layer.json"
    assert bench(quantize, "--shape", "tiny", "--preset", preset, "--samples", 2, "--sequence-length", 90, "--json", out) == 0
    rows = check_file(out, "quantize")
    stages = [row for row in rows if row["operation"] == "quantize"]
    linears = {row["layer"]: row for row in rows if row["operation"] == "linear"}
    assert list(linears) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert linears["k_proj"]["shape"] == [32, 64] and linears["down_proj"]["shape"] == [64, 96]
    assert all(0 < row["error"] < 1 and row["median_seconds"] > 0 for row in linears.values())
    assert sum(row["seconds"] for row in stages[:-1]) == pytest.approx(stages[-1]["seconds"])
    assert stages[-1]["model_seconds"] == pytest.approx(3 * stages[-1]["seconds"]) and stages[-1]["stage"] == "all"
    assert next(row for row in stages if row["stage"] == "Hessian products")["seconds"] > 0
    assert sum(row["median_seconds"] for row in linears.values()) <= stages[-1]["seconds"] * 1.05
    assert "| down_proj " in capsys.readouterr().out


def test_decode_a_random_model(tmp_path, capsys):
    out = tmp_path / "decode.json"
    options = ["--presets", "2d-2.25", "--modes", "eager,graph", "--tokens", 6, "--repeats", 3]
    assert bench(decode, "--shape", "tiny", *options, "--json", out) == 0
    rows = check_file(out, "decode")
    assert [(row["operation"], row["method"]) for row in rows] == [
        (f"decode, {mode}", method) for mode in ("eager", "graph") for method in ("gptvq", "torch")]
    assert rows[0]["speedup"]["torch bf16"] > 0 and rows[0]["tokens_per_second"] == pytest.approx(1 / rows[0]["median_seconds"])
    assert rows[0]["format"] == "2D K16" and 2 < rows[0]["bits_per_value"] < 6 and rows[1]["bits_per_value"] == 16
    assert "decode, graph" in capsys.readouterr().out


def test_the_packed_model_is_the_dense_ones_shape():
    ours, dense = decode_gpu.packed("tiny", VQConfig.preset("2d-2.25"), CPU), decode_gpu.dense("tiny", CPU)
    names = [name for name, _ in dense.named_modules()]
    assert [name for name, _ in ours.named_modules()] == names and len(ours.model.layers) == 3
    assert sum(type(module).__name__ == "VQLinear" for module in ours.modules()) == 21
    std = ours.model.layers[1].mlp.up_proj.dequantize().std()
    assert float(std) == pytest.approx(0.02, rel=0.05)
    steps = decode_gpu.Steps(ours, "eager", CPU)
    steps.restart()
    steps.token.fill_(3)
    with torch.inference_mode():
        for _ in range(4):
            steps.step()
        again = ours(input_ids=torch.tensor([[3]]), use_cache=False).logits
    assert int(steps.position) == 4 and again.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module, options", [(quantize, ["--shape", "llama2-7b"]), (decode, ["--shape", "llama2-7b"]), (gemv, [])])
def test_no_gpu_is_said(module, options, capsys):
    assert bench(module, *options, "--device", "cuda") == 1
    assert "there is no CUDA device here" in capsys.readouterr().err


def test_unknown_mode_and_shape_are_named(capsys):
    for options, message in ((["--modes", "magic"], "--modes: got magic"), (["--presets", "9d"], "--presets: got 9d"),
                             (["--tokens", "9999"], "--tokens: got 9999, the cache has room for 504")):
        assert bench(decode, "--shape", "tiny", *options) == 1 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench(quantize, "--shape", "llama9")


GPU = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
  *get_device_name*) echo "Made-up GPU (80 GB)";;
  *layer-70b*) sleep 30;;
  *gpu-tests* | *"-m gpu"*) exit 3;;
esac
"""


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs timeout (coreutils)")
def test_gpu_script_goes_on_where_a_step_fails(tmp_path):
    """With a stand-in for Python that finds a GPU: a step that fails or takes too long ends nothing but itself."""
    stub = tmp_path / "python"
    stub.write_text(GPU.format(folder=tmp_path))
    stub.chmod(0o755)
    script = tmp_path / "bench" / "gpu.sh"                    # it works in the folder above its own
    script.parent.mkdir()
    script.write_text((ROOT / "bench" / "gpu.sh").read_text().replace("gpu-layer-70b 300", "gpu-layer-70b 1"))
    done = subprocess.run(["bash", script, "gpu"], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out"), "PATH": "/usr/bin:/bin"})
    summary = {line.split()[0]: line for line in done.stdout.partition("== summary")[2].splitlines() if line}
    assert done.returncode == 1 and done.stderr == "" and "GPU: Made-up GPU (80 GB)" in done.stdout
    assert "FAILED (exit code 3)" in summary["gpu-tests"] and "STOPPED after 1 s" in summary["gpu-layer-70b"]
    assert all(" ok " in summary[name] for name in ("build", "gpu-gemv", "gpu-layer-7b", "gpu-decode-compile"))
    assert "tests" not in summary and f"--json {tmp_path}/out/made-up-gpu-80-gb-gemv.json" in (tmp_path / "calls").read_text()


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs timeout (coreutils)")
def test_gpu_script_keeps_to_its_time(tmp_path):
    """With stand-ins for Python, compute-sanitizer and timeout: what each step may take, and that all comes back in one file."""
    for name, text in (("python", GPU), ("compute-sanitizer", "#!/bin/sh\necho $2\n"),
                       ("timeout", "#!/bin/sh\necho $3 >> {folder}/limits\nshift 3\nexec \"$@\"\n")):
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    script = shutil.copytree(ROOT / "bench", tmp_path / "tree" / "bench", ignore=lambda *_: {"results"}) / "gpu.sh"

    def run(*parts, budget):
        return subprocess.run(["bash", script, *parts], capture_output=True, text=True, env={
            **os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "PATH": f"{tmp_path}:/usr/bin:/bin",
            "BUDGET": str(budget), "ARCHIVE": str(tmp_path / "all.tar.gz")})

    done = run("sanitizer", "tests", budget=110)
    tools = ["memcheck", "racecheck", "synccheck", "initcheck"]
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        summary = {line.split()[0]: line for line in archive.extractfile("./summary.txt").read().decode().splitlines()}
        assert archive.extractfile("./racecheck.log").read() == b"racecheck\n"
    assert done.returncode == 1 and done.stderr == "" and list(summary)[:3] == ["build", "gpu-tests", "gpu-triton-tests"]
    assert {*list(summary)[3:]} == {*tools, "GPU:"} and all(" ok " in summary[tool] for tool in tools)
    limits = [int(limit) for limit in (tmp_path / "limits").read_text().split()]
    assert all(30 < limit <= 50 for limit in limits[:3]) and all(60 < limit <= 100 for limit in limits[3:]) and len(limits) == 7
    assert run("bench", budget=20).stdout.count("skipped: no time left") == 9
    refused = run("everything", budget=20)
    assert refused.returncode == 2 and "got the part everything" in refused.stderr
