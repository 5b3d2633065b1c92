"""The benches as a developer runs them, on a tiny model: their result files, tables, comparisons and errors."""
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from bench_runs import bench, check_file

from bench import dequantize, layers, pages, quality, rounding, runner
from gptvq.config import PRESETS, VQConfig
from gptvq.hessian import Hessian

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--samples", "4", "--sequence-length", "64", "--dtype", "float32", "--device", "cpu"]


def texts(model):
    return model.parent / "calibration.txt", model.parent / "test.txt"


def test_layers(my_model, tmp_path, capsys):
    calibration, heldout = texts(my_model)
    out = tmp_path / "layers.json"
    assert bench(quality, "--layers", "--model", my_model, "--calibration", calibration, "--heldout", heldout, *SMALL,
                 "--blocks", "0,1", "--linears", "q_proj,down*", "--presets", "2d-2.25,1d-3.125", "--json", out) == 0
    rows = check_file(out, "quality")
    at = {(r["preset"], r["layer"], r["method"]): r for r in rows}
    names = [f"model.layers.{b}.{name}" for b in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert len(rows) == len(at) == 2 * 5 * (len(names) + 1)
    for preset in ("2d-2.25", "1d-3.125"):
        for layer in (*names, "mean"):
            rtn, scalar, paper, ours = (at[preset, layer, method] for method in ("rtn", "gptq", "paper", "gptvq"))
            assert scalar["error_calibration"] < rtn["error_calibration"] and scalar["bits_per_value"] == rtn["bits_per_value"]
            assert ours["bits_per_value"] == paper["bits_per_value"] and ours["format"] == paper["format"]
            assert 0 < ours["error_calibration"] < paper["error_calibration"] < 1
            mended = at[preset, layer, "paper-mended"]
            assert mended["error_calibration"] != paper["error_calibration"] and mended["format"] == paper["format"]
            assert ours["ratio_heldout"]["paper-mended"] == pytest.approx(ours["error_heldout"] / mended["error_heldout"])
            assert ours["error_heldout"] > 0 and rtn["error_calibration"] > 0
            assert ours["ratio"]["paper"] == pytest.approx(ours["error_calibration"] / paper["error_calibration"])
            assert ours["ratio_heldout"]["rtn"] == pytest.approx(ours["error_heldout"] / rtn["error_heldout"])
        spec = VQConfig.preset(preset).spec(64, 96)
        assert at[preset, names[1], "gptvq"]["shape"] == [64, 96]
        assert at[preset, names[1], "gptvq"]["bits_per_value"] == spec.bits_per_value
        mean, parts = at[preset, "mean", "gptvq"], [at[preset, layer, "gptvq"] for layer in names]
        assert mean["error_heldout"] == pytest.approx(sum(r["error_heldout"] for r in parts) / 4)
        assert mean["layer_ratio"]["paper"] == pytest.approx(sum(r["ratio"]["paper"] for r in parts) / 4)
        change = f"{100 * (mean['ratio']['paper'] - 1):+.1f} %"
        line = next(line for line in capsys_lines(capsys, out) if f"| {preset} " in line)
        mended = f"{100 * (mean['ratio_heldout']['paper-mended'] - 1):+.1f} %"
        assert change in line and mended in line and f"{100 * mean['error_calibration']:.3f} %" in line
    assert bench(quality, "--table", out, "--stages") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "| 1d-3.125 " in line)
    after = sum(at["1d-3.125", layer, "gptvq"]["stages"]["sweep 2"] for layer in names) / 4
    assert f"| {100 * after:.3f} % |" in line


def capsys_lines(capsys, path):
    """The table of a result file, as --table prints it."""
    capsys.readouterr()
    assert bench(quality, "--table", path) == 0
    return capsys.readouterr().out.splitlines()


def test_perplexity_in_parts(my_model, tmp_path, capsys):
    """Rows measured one by one make the same table, with the ratios across the files."""
    calibration, text = texts(my_model)
    common = ["--perplexity", "--model", my_model, "--calibration", calibration, "--text", text, *SMALL, "--window", "64",
              "--max-windows", "3", "--presets", "2d-2.25"]
    files = []
    for methods in ("gptvq,paper", "dense,rtn"):
        files.append(tmp_path / f"{methods[:3]}.json")
        assert bench(quality, *common, "--methods", methods, "--json", files[-1]) == 0
    rows = {r["method"]: r for file in files for r in check_file(file, "quality")}
    assert rows["dense"]["bits_per_value"] == 32 and rows["dense"]["preset"] is None and "quantize_seconds" not in rows["dense"]
    assert all(row["quantize_seconds"] > 0 for method, row in rows.items() if method != "dense")
    assert rows["gptvq"]["bits_per_value"] == rows["paper"]["bits_per_value"] < 4
    assert rows["gptvq"]["linear_bytes"] == rows["gptvq"]["bits_per_value"] * rows["dense"]["linear_bytes"] / 32
    assert 0 < rows["gptvq"]["mean_error"] < rows["paper"]["mean_error"] < 1
    assert {r["windows"] for r in rows.values()} == {3} and all(math.isfinite(r["perplexity"]) for r in rows.values())
    assert rows["rtn"]["ratio"]["dense"] == rows["rtn"]["perplexity"] / rows["dense"]["perplexity"] != 1
    assert "dense" not in rows["gptvq"]["ratio"]
    capsys.readouterr()
    assert bench(quality, "--table", *files) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["dense", "rtn", "paper", "gptvq"]
    assert f"{rows['gptvq']['perplexity'] / rows['dense']['perplexity']:,.3f}" in lines[3]


def test_results_of_other_settings_are_not_mixed(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        runner.Results("quality", [], str(tmp_path / f"{name}.json"), {"seed": seed})
    assert bench(quality, "--table", tmp_path / "a.json", tmp_path / "b.json") == 1
    assert "seed differ" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("{}")
    assert bench(quality, "--table", tmp_path / "c.json") == 1
    assert "not a result file" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (["--presets", "9d-1"], "9d-1"), (["--methods", "magic"], "magic"),
    (["--calibration", "no-such.txt"], "no such file: no-such.txt"),
    (["--blocks", "7"], "blocks 0 to 1"), (["--linears", "nothing"], "a block of this model has down_proj, gate_proj"),
    (["--json", "no-such-folder/x.json"], "cannot be written"),
])
def test_bad_input_is_named(my_model, options, message, capsys):
    calibration, heldout = texts(my_model)
    assert bench(quality, "--layers", "--model", my_model, "--calibration", calibration, "--heldout", heldout, *SMALL,
                 "--blocks", "0", "--presets", "2d-2.25", *options) == 1
    assert message in capsys.readouterr().err


def test_dequantize(tmp_path, capsys):
    out = tmp_path / "dequantize.json"
    if not dequantize.native.serves(torch.device("cpu")):
        pytest.skip("gptvq._C is not built")
    assert bench(dequantize, "--shapes", "64x96", "--presets", "2d-2.25-s64", "--threads", "1", "--repeats", "3", "--json", out) == 0
    native, reference = check_file(out, "dequantize")
    assert (native["method"], reference["method"], native["shape"], native["cache"]) == ("native", "reference", [64, 96], "hot")
    moved = VQConfig.preset("2d-2.25-s64").spec(64, 96).nbytes + 2 * 64 * 96
    assert native["gb_per_second"] == pytest.approx(moved / native["median_seconds"] / 1e9)
    assert native["speedup"]["reference"] > 1 and reference["speedup"] == {}
    assert capsys.readouterr().out.count("\n") == 4


def test_pages(tmp_path, capsys, monkeypatch):
    if pages.why_not():
        pytest.skip(f"no large pages: {pages.why_not()}")
    out = tmp_path / "pages.json"
    monkeypatch.setattr(pages, "RING_BYTES", 50_000)
    monkeypatch.setattr(pages, "settle", lambda layers, settle=pages.settle: settled.append(len(layers)) or settle(layers))
    settled: list[int] = []
    assert bench(pages, "--shapes", "64x96", "--presets", "2d-2.25-s64", "--threads", "1", "--repeats", "3", "--json", out) == 0
    rows = check_file(out, "pages")
    kinds = [("gptvq", "2d-2.25-s64"), ("torch", None), ("gptvq", None)]
    assert [(row["method"], row["preset"], row["pages"]) for row in rows] == [(*kind, size) for kind in kinds for size in ("small", "large")]
    for row, count in zip(rows[1::2], settled):
        nbytes = VQConfig.preset("2d-2.25-s64").spec(64, 96).nbytes if row["preset"] else 2 * 64 * 96
        assert count == 1 + 50_000 // nbytes and row["gb_per_second"] == pytest.approx(nbytes / row["median_seconds"] / 1e9)
    assert capsys.readouterr().out.count("\n") == 5
    monkeypatch.setenv("GPTVQ_LARGE_PAGES", "0")
    assert bench(pages, "--shapes", "64x96") == 1 and "GPTVQ_LARGE_PAGES=0" in capsys.readouterr().err


def test_a_broken_off_run_keeps_its_rows(tmp_path):
    results = runner.Results("x", ["--json", "r.json"], str(tmp_path / "r.json"), {})
    results.add([{"value": math.inf}])
    assert runner.load(str(tmp_path / "r.json"))["rows"] == [{"value": None}]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_commands_name_no_place_of_this_machine():
    outside = os.path.join(os.sep, "somewhere", "wiki.txt")
    assert runner.command("x", ["--text", outside, f"--json={ROOT}/bench/r.json", "2d"]) == (
        "python -m bench.x --text wiki.txt --json=bench/r.json 2d")


def test_paired_samples_take_turns():
    calls = []
    times = runner.paired({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=4, least=0.0)
    assert "".join(calls[4:]) == "ab" "ba" "ab" "ba"
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4}
    assert runner.ratio({"a": [1.0, 2.0, 3.0], "b": [2.0, 8.0, 9.0]}, "a", "b") == 3.0


@pytest.mark.parametrize("bits, group, cols", [(2, 64, 128), (3, 128, 200), (4, 64, 10)])
def test_round_to_nearest(bits, group, cols):
    weight = torch.randn(8, cols)
    rounded = rounding.round_to_nearest(weight, bits, group)
    for first in range(0, cols, group):
        part, exact = rounded[:, first: first + group], weight[:, first: first + group]
        step = (exact.amax(1).clamp_min(0) - exact.amin(1).clamp_max(0)) / (2**bits - 1)
        assert all(len(row.unique()) <= 2**bits for row in part)
        assert bool(((part - exact).abs().amax(1) <= 1.02 * step).all())
        assert bool(((part - exact).abs() <= 0.51 * step[:, None]).float().mean() > 0.6)
    assert bool((rounding.round_to_nearest(torch.zeros(2, cols), bits, group) == 0).all())


def test_size_of_rounding():
    assert rounding.bits_per_value(1536, 2, 64) == 2.28125
    assert rounding.bits_per_value(576, 3, 128) == 3 + 5 * 19 / 576       # the last group is half a group
    assert rounding.nearest_group(1536, 2, 2.25) == 64 and rounding.nearest_group(1536, 3, 3.125) == 128
    assert rounding.nearest_group(1536, 4, 9.0) == 64                     # not 16: sources are often 4-bit groups of 32
    for preset in PRESETS:
        spec = VQConfig.preset(preset).spec(576, 1536)
        group = rounding.nearest_group(1536, spec.index_bits, spec.bits_per_value)
        assert abs(rounding.bits_per_value(1536, spec.index_bits, group) - spec.bits_per_value) < 0.1


def test_layer_error_is_the_formula():
    weight, quantized = torch.randn(5, 12), torch.randn(5, 12)
    x = {"calibration": torch.randn(40, 12), "heldout": torch.randn(50, 12) * torch.arange(12)}
    layer = layers.Layer("l", weight, {side: Hessian(12) for side in x})
    for side in x:
        layer.hessians[side].add(x[side])
        outputs = ((weight - quantized) @ x[side].T).square().sum() / (weight @ x[side].T).square().sum()
        assert layer.error(quantized, side) == pytest.approx(float(outputs), rel=1e-5)
        assert layer.error(weight, side) == 0


def test_hessians_are_those_of_each_text(my_model):
    from gptvq.hf import open_model

    model, _ = open_model(my_model, device="cpu", dtype="float32")
    tokens = {"calibration": torch.randint(1, 250, (2, 16)), "heldout": torch.randint(1, 250, (3, 16))}
    seen = {}
    linear = model.model.layers[1].mlp.down_proj
    found = layers.collect(model, tokens, [1], ["down_proj"], torch.device("cpu"))
    handle = linear.register_forward_pre_hook(lambda m, args: seen["x"].append(args[0].flatten(0, 1)))
    assert [layer.name for layer in found] == ["model.layers.1.mlp.down_proj"] and torch.equal(found[0].weight, linear.weight)
    for side, ids in tokens.items():
        seen["x"] = []
        with torch.no_grad():
            model(ids)
        x = torch.cat(seen["x"])
        assert found[0].hessians[side].tokens == ids.numel() == len(x)
        torch.testing.assert_close(found[0].hessians[side].matrix(), 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)
    handle.remove()


@pytest.mark.parametrize("broken, code, verdict", [("no such step", 0, "ok"), ("-m pytest", 1, "FAILED (exit code 3)")])
def test_gpu_script_says_what_ran(tmp_path, broken, code, verdict):
    """With a stand-in for Python: every step is started, a failed one decides the exit code, no GPU is said plainly."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *"{broken}"*) exit 3;; esac\n')
    stub.chmod(0o755)
    texts = {"CALIBRATION": "a.txt", "TEXT": "b.txt"} if code else {}
    environment = {k: v for k, v in os.environ.items() if k not in ("MODEL", "CALIBRATION", "TEXT")}
    done = subprocess.run([ROOT / "bench" / "gpu.sh"], capture_output=True, text=True,
                          env={**environment, **texts, "PYTHON": str(stub), "OUT": str(tmp_path / "out")})
    assert done.returncode == code and done.stderr == ""
    summary = done.stdout.partition("== summary")[2]
    assert "NO CUDA DEVICE" in summary and "sanitizer            skipped: no CUDA device" in summary
    assert verdict in next(line for line in summary.splitlines() if line.startswith("tests "))
    assert ("quality-layers" in summary) == bool(texts) and ("quality              skipped" in summary) != bool(texts)
    calls = (tmp_path / "calls").read_text()
    assert "-m pip install -q --no-build-isolation --no-deps -e ." in calls and f"--json {tmp_path}/out/dequantize.json" in calls
