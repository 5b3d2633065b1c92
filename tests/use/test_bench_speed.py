"""The benches of speed on tiny shapes and a tiny model: rows, ratios, tables, and clear words where something is missing."""
import importlib.util
import types
from pathlib import Path

import pytest
import torch
from bench_runs import bench, check_file
from job.tiny_models import build

from bench import arm_mca, decode, decode_linears, gemv, ggml, int4, llamacpp, runner
from bench.contenders import BASELINES, Contender, Shape, inputs, label, random_weight
from gptvq import evaluate
from gptvq.config import VQConfig
from gptvq.demo import bundled_model
from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.hf import open_model
from gptvq.quantize import quantize

TINY = ["--shapes", "32x256", "--presets", "2d-2.25-s64", "--threads", "1", "--repeats", "3"]


def missing(*loads):
    """The reasons why baselines cannot run here."""
    found = []
    for load in loads:
        try:
            load()
        except BackendUnavailable as error:
            found.append(str(error))
    return found


@pytest.fixture(autouse=True)
def small_rings(monkeypatch):
    for module in (gemv, decode_linears):
        monkeypatch.setattr(module, "RING_BYTES", 1 << 16)


def test_gemv(tmp_path, capsys):
    out = tmp_path / "gemv.json"
    assert bench(gemv, *TINY, "--alone", "--json", out) == 0
    printed, rows = capsys.readouterr(), check_file(out, "gemv")
    spec = VQConfig.preset("2d-2.25-s64").spec(32, 256)
    for reason in missing(ggml.load, int4.load):
        assert reason in printed.err
    for cache in ("cold", "hot"):
        at = {label(row): row for row in rows if row["cache"] == cache}
        assert {"gptvq 2d-2.25-s64 a16", "gptvq 2d-2.25-s64 a8", "gptvq 2d-2.25-s64 fp32", "torch fp32", "torch bf16"} <= set(at)
        ours, bf16 = at["gptvq 2d-2.25-s64 a8"], at["torch bf16"]
        assert ours["bits_per_value"] == spec.bits_per_value and bf16["bits_per_value"] == 16 and ours["operation"] == "gemv"
        assert ours["gb_per_second"] == pytest.approx(spec.nbytes / ours["median_seconds"] / 1e9)
        assert bf16["gb_per_second"] == pytest.approx(2 * 32 * 256 / bf16["median_seconds"] / 1e9)
        assert ours["gw_per_second"] == pytest.approx(32 * 256 / ours["median_seconds"] / 1e9)
        assert ours["speedup"]["torch bf16"] > 0 and "torch bf16" not in bf16["speedup"]
        alone = at["gptvq kernel 2d-2.25-s64 a8"]
        assert alone["gb_per_second"] == pytest.approx(spec.nbytes / alone["median_seconds"] / 1e9) and alone["speedup"]["torch bf16"] > 0
        assert not any(name.startswith("gptvq") for row in at.values() for name in row["speedup"])
        if not missing(int4.load):
            assert at["int4 group 32 a8"]["bits_per_value"] == 4.5 and 0 < ours["of_read"] < 1
            assert at["read 2d-2.25-s64"]["bits_per_value"] == spec.bits_per_value
        if not missing(ggml.load):
            assert at["ggml Q4_0 a8"]["bits_per_value"] == 4.5 and ours["speedup"]["ggml Q4_0"] > 0
    line = next(line for line in printed.out.splitlines() if "gptvq 2d-2.25-s64 a16" in line and "cold" in line)
    assert f"{1e6 * rows[0]['median_seconds']:,.1f}" in line


def test_gemv_of_many_tokens_and_its_chart(tmp_path, capsys):
    out, chart = tmp_path / "gemv.json", tmp_path / "gemv.png"
    assert bench(gemv, *TINY, "--m", "2,5", "--cache", "hot", "--baselines", "torch bf16", "--json", out) == 0
    rows = check_file(out, "gemv")
    assert [(r["m"], r["method"]) for r in rows] == [(m, method) for m in (2, 5) for method in ["gptvq"] * 3 + ["torch"]]
    assert all(row["operation"] == "gemm" for row in rows)
    assert rows[-1]["gw_per_second"] == pytest.approx(5 * 32 * 256 / rows[-1]["median_seconds"] / 1e9)
    code, drawn = bench(gemv, "--table", out, "--plot", chart), importlib.util.find_spec("matplotlib") is not None
    assert code == (0 if drawn else 1) and chart.is_file() == drawn
    assert drawn or "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("cold", [True, False])
def test_contenders_compute_the_product(cold, m):
    """Each with its own weights, which its row's format describes; read reads."""
    shape = Shape(48, 256, torch.device("cpu"), torch.float32, lambda nbytes: 2)
    with torch.inference_mode():
        found = shape.contenders(["2d-2.25-s64"], ["fp32"], [name for name in BASELINES if name != "ggml Q4_K"], m, 1, cold,
                                 alone=True)
        y = {one.name: one.run() for one in found}
    x, packed = inputs(m, 256).double(), random_weight(VQConfig.preset("2d-2.25-s64"), 48, 256).dequantize().double()
    exact = {one.name: x @ (packed if one.name.startswith("gptvq") else shape.some[:48].double()).T for one in found}
    assert {one.calls for one in found if one.row["method"] in ("gptvq", "gptvq kernel", "torch")} == {2 if cold else 1}
    bits = {"gptvq 2d-2.25-s64 fp32": 20, "gptvq kernel 2d-2.25-s64 fp32": 20, "torch fp32": 20, "torch bf16": 6, "ggml Q4_0": 3, "ggml Q2_K": 1, "int4 a16": 3}
    for name in bits:
        if name in y:
            error = (torch.as_tensor(y[name]).double() - exact[name]).norm() / exact[name].norm()
            assert error < 2.0 ** -bits[name], f"{name}: {error}"
    assert ("read 2d-2.25-s64" in y) == (m == 1 and not missing(int4.load))
    for one in found:
        one.close()
    shape.close()


def test_times_are_those_of_one_product(monkeypatch):
    """By a clock that only the contenders move: two products of 3 ms in a call, against one of 6 ms and a read of 1 ms."""
    now = [0.0]
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None))

    def contender(name, seconds, calls, nbytes):
        row = {"method": name.split()[0], "preset": None, "format": name}
        return Contender(name, row, nbytes, calls, lambda: now.__setitem__(0, now[0] + calls * seconds), "read")

    shape = types.SimpleNamespace(rows=8, cols=16, contenders=lambda *_: [
        contender("gptvq", 0.003, 2, 300), contender("torch", 0.006, 1, 600), contender("read", 0.001, 3, 300)])
    ours, torch_, read = gemv.compare(shape, gemv.parser().parse_args([]), 1, 1, "cold")
    assert [row["median_seconds"] for row in (ours, torch_, read)] == pytest.approx([0.003, 0.006, 0.001])
    assert ours["gb_per_second"] == pytest.approx(300 / 0.003 / 1e9) and ours["gw_per_second"] == pytest.approx(128 / 0.003 / 1e9)
    assert ours["speedup"] == {"torch": pytest.approx(2)} and ours["of_read"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("cold", [True, False])
def test_the_probe_reads_as_many_bytes(cold, monkeypatch):
    """As the packed weight has, to whole cache lines; cold, of other memory each time, as often as there are copies of the weight."""
    probes = []
    monkeypatch.setattr(int4, "load", lambda: None)
    monkeypatch.setattr(int4, "Reads", lambda stretches, threads: probes.append(stretches) or types.SimpleNamespace(calls=len(stretches)))
    shape = Shape(48, 256, torch.device("cpu"), torch.float32, lambda nbytes: 3)
    packed, read = shape.contenders(["2d-2.25-s64"], ["a16"], ["read"], 1, 2, cold)
    nbytes = VQConfig.preset("2d-2.25-s64").spec(48, 256).nbytes
    places = {part.data_ptr() for part in probes[0]}
    assert packed.nbytes == nbytes and read.nbytes == nbytes // 64 * 64 and {part.nbytes for part in probes[0]} == {read.nbytes}
    assert len(places) == (3 if cold else 1) and all(at % 64 == 0 for at in places)
    assert max(places) - min(places) == (2 * read.nbytes if cold else 0) and read.calls == len(probes[0])


@pytest.mark.parametrize("options, message", [
    (["--presets", "9d-1"], "--presets: got 9d-1"), (["--baselines", "magic"], "--baselines: got magic"),
    (["--cache", "warm"], "need some of cold, hot"), (["--table", "no-such.json"], "no-such.json: not a readable result file"),
])
def test_bad_input_is_named(options, message, capsys):
    assert bench(gemv, *TINY, *options) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_said(capsys):
    assert bench(gemv, *TINY, "--device", "cuda") == 1
    assert "there is no CUDA device here" in capsys.readouterr().err


def test_decode(my_model, tmp_path, capsys):
    out = tmp_path / "decode.json"
    options = ["--presets", "2d-2.25", "--tokens", "4", "--repeats", "3", "--threads", "1"]
    assert bench(decode, "--model", my_model, *options, "--alone", "--json", out) == 0
    rows = check_file(out, "decode")
    tokens = {row["format"] if row["method"] == "torch" else row["activations"]: row for row in rows if row["operation"] == "decode"}
    assert set(tokens) == {"a16", "a8", "bf16", "fp32"}
    for row in tokens.values():
        assert row["tokens_per_second"] == pytest.approx(1 / row["median_seconds"])
    assert tokens["a16"]["format"] == "2D K16" and 2 < tokens["a16"]["bits_per_value"] < 4 and tokens["fp32"]["speedup"]["torch bf16"] > 0
    alone = [row for row in rows if row["operation"] == "linears of one token"]
    assert {row["method"] for row in alone} >= {"gptvq", "gptvq kernel", "torch"} and all(row["linears"] == 14 for row in alone)
    shapes = [(64, 64)] * 4 + [(32, 64)] * 4 + [(96, 64)] * 4 + [(64, 96)] * 2
    assert alone[0]["bits_per_value"] == pytest.approx(8 * sum(VQConfig.preset("2d-2.25").spec(*s).nbytes for s in shapes)
                                                       / sum(a * b for a, b in shapes))
    shared = [row for row in rows if row["operation"] == "linears of one token, as in the model"]
    assert [row["activations"] for row in shared] == ["a16", "a8"] and all(row["linears"] == 14 for row in shared)
    printed = capsys.readouterr()
    assert "no rows of llama.cpp: it opens .gguf files alone" in printed.err and printed.out.count("\n") == 2 + len(rows)


def test_decode_with_a_packed_head(my_model, tmp_path):
    out = tmp_path / "decode.json"
    options = ["--presets", "2d-2.25", "--tokens", "3", "--repeats", "1", "--threads", "1", "--parts", "tokens", "--activations", "a16"]
    assert bench(decode, "--model", my_model, *options, "--head", "2d-4.125", "--json", out) == 0
    plain, headed = [row for row in check_file(out, "decode") if row["method"] == "gptvq"]
    assert (plain["format"], headed["format"]) == ("2D K16", "2D K16, head 2D K256")
    assert headed["bits_per_value"] > plain["bits_per_value"] and headed["tokens_per_second"] > 0


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_head_alone_leaves_an_embedding_of_its_own(name):
    dense = build(name)
    model = decode.with_random_weights(dense, torch.arange(8), VQConfig.preset("2d-2.25", head="2d-4.125"))
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding) == (name == "llama")
    assert model.get_output_embeddings().spec.label == "2d K256"


@torch.no_grad()
def test_compiled_decoding_feeds_the_tokens_that_eager_decoding_does(my_model):
    dense, _ = open_model(my_model, device="cpu", dtype="float32")
    prompt = torch.arange(1, 9)
    steps, found = decode.decode_gpu.Steps(dense, "eager", torch.device("cpu"), 16), []
    for _ in range(2):
        steps.restart(prompt)
        found.append([int(steps.token), *(steps.run() or int(steps.token) for _ in range(5))])
    assert found[0] == found[1] == evaluate.decode(dense, prompt, 6)[0]


def test_decode_through_torch_compile(my_model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, inner=torch.compile, **options: inner(f, backend="aot_eager"))
    out = tmp_path / "decode.json"
    options = ["--presets", "2d-2.25", "--tokens", "3", "--repeats", "1", "--threads", "1", "--parts", "tokens", "--activations", "a16"]
    assert bench(decode, "--model", my_model, *options, "--modes", "eager,compile", "--json", out) == 0
    rows = check_file(out, "decode")
    assert [(row["operation"], row["method"]) for row in rows] == [(operation, method) for method in ("gptvq", "torch", "torch")
                                                                  for operation in ("decode", "decode, compile")]
    assert rows[1]["speedup"]["torch bf16, compile"] > 0 and rows[0]["bits_per_value"] == rows[1]["bits_per_value"]


def test_decode_takes_no_mode_that_is_for_gpus(my_model, capsys):
    assert bench(decode, "--model", my_model, "--modes", "graph") == 1
    assert "--modes: got graph" in capsys.readouterr().err


def test_decode_of_a_checkpoint(my_model, tmp_path, capsys):
    options = ["--parts", "tokens", "--activations", "a16", "--tokens", "2", "--repeats", "1", "--threads", "1"]
    report = quantize(my_model, tmp_path / "packed", "2d-2.25", calibration=my_model.parent / "calibration.txt", samples=2,
                      sequence_length=32, device="cpu")
    out = tmp_path / "decode.json"
    assert bench(decode, "--model", my_model, "--packed", tmp_path / "packed", *options, "--json", out) == 0
    ours = check_file(out, "decode")[0]
    assert ours["bits_per_value"] == pytest.approx(report.bits_per_value) and ours["tokens_per_second"] > 0
    assert bench(decode, "--model", my_model, "--packed", my_model, *options) == 1
    assert "not a gptvq checkpoint" in capsys.readouterr().err


def test_calls_are_in_the_order_of_the_model(my_model):
    dense, _ = open_model(my_model, device="cpu", dtype="float32")
    prompt = torch.arange(1, 9)
    q, k, gate, down = (64, 64), (32, 64), (96, 64), (64, 96)
    assert decode.calls(dense, prompt, decode.blocks_linears(dense, prompt)) == 2 * [[q, k, k], [q], [gate, gate], [down]]


def test_random_weights_are_as_large_as_those_they_replace(my_model):
    dense, _ = open_model(my_model, device="cpu", dtype="float32")
    prompt = torch.arange(1, 9)
    packed = decode.with_random_weights(dense, prompt, VQConfig.preset("2d-2.25-s64"))
    for name, linear in decode.blocks_linears(dense, prompt).items():
        other = packed.get_submodule(name)
        assert float(other.dequantize().std() / linear.weight.detach().std()) == pytest.approx(1, rel=0.02)
    twin = decode.copied(packed, "a8")
    ours, theirs = (model.model.layers[0].mlp.up_proj for model in (packed, twin))
    assert theirs is not ours and theirs.idx is ours.idx and theirs.activations == "a8"
    assert torch.equal(twin(prompt[None]).logits, packed(prompt[None]).logits)


def test_llama_cpp_decodes_as_transformers_does():
    """The demo's file and one prompt: the greedy continuations begin alike, though llama.cpp rounds its activations."""
    if reasons := missing(llamacpp.load, demo_model):
        pytest.skip(reasons[0])
    dense, tokenizer = open_model(demo_model(), device="cpu", dtype="float32")
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"][0]
    expected, _ = evaluate.decode(dense, prompt, 4)
    model = llamacpp.LlamaModel(Path(demo_model()))
    ids, speed = model.decode(prompt.tolist(), 4, 1)
    again, _ = model.decode(prompt.tolist(), 4, 1)
    model.close()
    assert ids == again == expected and speed > 0


def demo_model():
    try:
        return bundled_model()
    except ConfigError as error:
        raise BackendUnavailable(str(error)) from error


def test_arm_mca(tmp_path, capsys):
    if reasons := missing(arm_mca.compiler, arm_mca.analyser):
        assert bench(arm_mca) == 1
        assert reasons[0] in capsys.readouterr().err and "apt-get install" in reasons[0]
        pytest.skip(reasons[0])
    out = tmp_path / "arm.json"
    assert bench(arm_mca, "--cores", "neoverse-n1,apple-m1", "--json", out) == 0
    rows = check_file(out, "arm_mca")
    assert [row["device"] for row in rows] == ["neoverse-n1"] * 4 + ["apple-m1"] * 4
    cycles = {row["format"]: row["cycles_per_weight"] for row in rows[:4]}
    # two pipes for vectors: 32 dot products, 32 look-ups and 16 splits of nibbles are 80 operations for 512 weights
    assert cycles["2D K16"] == pytest.approx(80 / 2 / 512, rel=0.02)
    assert cycles["INT4, offset folded"] == pytest.approx(64 / 2 / 512, rel=0.02)
    assert rows[0]["speedup"]["INT4, q - 8"] == pytest.approx(cycles["INT4, q - 8"] / cycles["2D K16"])
    assert bench(arm_mca, "--cores", "no-such-core") == 1
    assert "'no-such-core' is not a recognized processor" in capsys.readouterr().err


def test_arm_mca_without_its_tools(monkeypatch, capsys):
    monkeypatch.setattr("bench.arm_mca.shutil.which", lambda name: None)
    assert bench(arm_mca) == 1
    assert "is not installed; on Debian: apt-get install" in capsys.readouterr().err
