"""bench.quality of a whole model: every method, a result file that is added to, errors that are the formula."""
import dataclasses
import importlib.util
import json

import pytest
import torch
from bench_runs import bench, check_file

from bench import gptq, others, quality, runner, whole
from gptvq.config import Recipe
from gptvq.errors import BackendUnavailable
from gptvq.hf import open_model

RUN_OF_MACHINE = ("cpu", "cpu_family", "cpu_model", "kernels")
METHODS = "dense,rtn,gptq-64,paper,gptvq,gptvq+tune"


@pytest.fixture(scope="module")
def options(my_model):
    return ["--model", my_model, "--calibration", my_model.parent / "calibration.txt", "--text", my_model.parent / "test.txt", "--samples", "4",
            "--sequence-length", "64", "--dtype", "float32", "--device", "cpu", "--window", "64", "--windows", "3", "--second-windows", "2",
            "--tune-samples", "8", "--tune-length", "32", "--presets", "2d-2.25"]


@pytest.fixture(scope="module")
def measured(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "quality.json"
    assert bench(quality, *options, "--methods", METHODS, "--json", out, "--checkpoints", folder / "made") == 0
    return out


def test_rows_of_every_method(measured):
    rows = {row["method"]: row for row in check_file(measured, "quality")}
    assert list(rows) == METHODS.split(",") and "error_heldout" not in rows["dense"]
    assert all(0 < row[key] for row in rows.values() for key in ("text_perplexity", "second_perplexity"))
    assert {(row["text_windows"], row["second_windows"]) for row in rows.values()} == {(3, 2)}
    for key in ("error_calibration", "error_heldout"):
        assert 0 < rows["gptvq"][key] < rows["paper"][key] < rows["rtn"][key] and rows["gptq-64"][key] < rows["rtn"][key]
    assert rows["gptvq"]["bits_per_value"] == rows["paper"]["bits_per_value"] == rows["gptvq+tune"]["bits_per_value"]
    assert rows["gptvq"]["linear_bytes"] == pytest.approx(rows["gptvq"]["bits_per_value"] * rows["dense"]["linear_bytes"] / 32)
    assert rows["gptq-64"]["linear_bytes"] == pytest.approx(rows["gptq-64"]["bits_per_value"] * rows["dense"]["linear_bytes"] / 32, abs=1)
    tuned = rows["gptvq+tune"]
    assert len(tuned["losses"]) == 2 and tuned["quantize_seconds"] > rows["gptvq"]["quantize_seconds"]
    assert tuned["text_perplexity"] != rows["gptvq"]["text_perplexity"]


def test_rows_are_not_measured_twice(options, measured, tmp_path, capsys, monkeypatch):
    out = tmp_path / "quality.json"
    values = json.loads(measured.read_text())
    values["rows"] = [row for row in values["rows"] if row["method"] != "rtn"]
    out.write_text(json.dumps(values))
    build, made = whole.build, []
    monkeypatch.setattr(whole, "build", lambda args, source, method, *rest: made.append(method) or build(args, source, method, *rest))
    assert bench(quality, *options, "--methods", METHODS, "--json", out) == 0
    assert made == ["rtn"] and {row["method"] for row in runner.load(out)["rows"]} == set(METHODS.split(","))
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:]] == METHODS.split(",")
    assert bench(quality, "--table", out) == 0 and capsys.readouterr().out == printed
    assert bench(quality, "--table", out, "--methods", "rtn,paper") == 0
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]] == ["rtn", "paper"]
    assert bench(quality, "--table", out, "--methods", "dense,gptvq", "--sizes") == 0
    sizes = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    rows = {row["method"]: row for row in runner.load(out)["rows"]}
    assert [line[0] for line in sizes] == ["dense", "2d-2.25"] and sizes[0][7] == "-" != sizes[1][7]
    assert sizes[1][5] == f"{rows['gptvq']['text_perplexity'] / rows['dense']['text_perplexity']:.2f}"
    assert bench(quality, "--table", out, "--methods", "gptvq", "--sizes") == 1 and "need one" in capsys.readouterr().err
    chart = tmp_path / "quality.png"
    code, drawn = bench(quality, "--table", out, "--plot", chart), importlib.util.find_spec("matplotlib") is not None
    assert drawn or "pip install matplotlib" in capsys.readouterr().err
    assert code == (not drawn) and (not drawn or chart.read_bytes()[:4] == b"\x89PNG")
    assert bench(quality, *options, "--windows", "2", "--methods", "rtn", "--json", out) == 1
    assert "max_windows differ" in capsys.readouterr().err


def test_a_packed_head(options, measured, tmp_path):
    out = tmp_path / "head.json"
    assert bench(quality, *options, "--methods", "dense,gptvq+head", "--json", out) == 0
    without, (_, row) = next(r for r in runner.load(measured)["rows"] if r["method"] == "gptvq"), check_file(out, "quality")
    assert row["linear_bytes"] > without["linear_bytes"] and row["error_heldout"] == pytest.approx(without["error_heldout"], rel=0.5)


def test_rotated_outputs_are_not_compared(options, tmp_path):
    out = tmp_path / "tried.json"
    assert bench(quality, *options, "--methods", "gptvq+heads,gptvq+rotation,gptvq+down_proj", "--json", out) == 0
    heads, rotated, down = check_file(out, "quality")
    assert all("error_heldout" not in row for row in (heads, rotated, down)) and down["added_bytes"] == 0 < down["solver_error"]
    assert heads["added_bytes"] == 0 and rotated["added_bytes"] % (4 * 64) == 0 < rotated["added_bytes"] and rotated["solver_error"] > 0


def test_errors_are_those_of_the_outputs(my_model):
    dense, other = (open_model(my_model, device="cpu", dtype="float32")[0] for _ in range(2))
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        other.get_submodule("model.layers.0.self_attn.v_proj").weight *= 0.5
    tokens, outputs = torch.randint(1, 250, (2, 16)), {}
    for model in (dense, other):
        model.get_submodule(name).register_forward_hook(lambda m, args, y: outputs.setdefault(m, []).append(y.double()))
        with torch.no_grad():
            for ids in tokens:
                model(ids[None])
    want, have = (torch.cat(outputs[model.get_submodule(name)]) for model in (dense, other))
    found = whole.output_errors(dense, other, tokens)
    assert found[name] == pytest.approx(float((want - have).square().sum() / want.square().sum()), rel=1e-5)
    assert len(found) == 14 and found["model.layers.0.self_attn.q_proj"] == 0
    assert found["model.layers.0.self_attn.v_proj"] == pytest.approx(0.25)


def test_gptq_of_a_model_sees_the_rounded_model(my_model):
    """The last linear's result is that of `gptq` on inputs of a model in which all linears before it are rounded."""
    model, _ = open_model(my_model, device="cpu", dtype="float32")
    tokens = torch.randint(1, 250, (4, 48))
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    bits = gptq.gptq_model(model, tokens, 3, 64)
    inputs = []
    linear = model.get_submodule(name)
    linear.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in tokens:
            model(ids[None])
    hessian = gptq.Hessian(weight.shape[1])
    for x in inputs:
        hessian.add(x)
    want, got = gptq.gptq(weight, hessian, 3, 64), linear.weight.detach()
    assert float(((want - got) ** 2).sum() / ((want - weight) ** 2).sum()) < 1e-2
    assert 3.2 < bits < 4 and len(got[0, :64].unique()) <= 8


def test_seeds_are_rows_of_one_line(options, measured, tmp_path, capsys):
    out = tmp_path / "quality.json"
    out.write_text(measured.read_text())
    assert bench(quality, *options, "--methods", "rtn,paper", "--seeds", "0,3", "--json", out) == 0
    rows = runner.load(out)["rows"]
    assert [(row["method"], row["seed"]) for row in rows[len(METHODS.split(",")):]] == [("paper", 3)]
    first, other = (row["text_perplexity"] for row in rows if row["method"] == "paper")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| paper"))
    assert first != other and f"{(first + other) / 2:,.2f} ± {abs(first - other) / 2:,.2f}" in line
    assert bench(quality, *options, "--perplexity", "--seeds", "0,3") == 1 and "takes one seed" in capsys.readouterr().err


def test_packed_models_decode_in_turns_with_the_dense_one(measured):
    rows = {row["method"]: row for row in runner.load(measured)["rows"]}
    assert {method for method, row in rows.items() if row.get("speedup", 0) > 0} == {"paper", "gptvq", "gptvq+tune"}


def test_mixed_precision_has_the_size_of_a_preset(options, measured, tmp_path):
    out = tmp_path / "mixed.json"
    assert bench(quality, *options, "--presets", "2d-3.125", "--methods", "gptvq,gptvq+mixed", "--json", out) == 0
    uniform, mixed = check_file(out, "quality")
    assert 0.9 * uniform["linear_bytes"] < mixed["linear_bytes"] <= uniform["linear_bytes"] and mixed["format"] != uniform["format"]


@pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="hqq is not installed")
def test_hqq_stores_what_it_says(my_model):
    model, _ = open_model(my_model, device="cpu", dtype="bfloat16")
    weight = model.get_submodule("model.layers.1.mlp.down_proj").weight.detach().clone()
    row = others.hqq_model(model, torch.randint(1, 250, (8,)), 2, 64)
    made = model.get_submodule("model.layers.1.mlp.down_proj")
    rounded = made.dequantize()
    assert row["bits_per_value"] == 2.5 and 0 < float((rounded - weight).square().sum() / weight.square().sum()) < 0.3
    assert all(len(group.unique()) <= 4 for group in rounded.reshape(-1, 64)[:50])
    x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(made(x), x @ rounded.T) and model(torch.randint(1, 250, (1, 8))).logits.isfinite().all()


def test_packages_that_are_missing_leave_their_rows_out(options, tmp_path, monkeypatch, capsys):
    def missing(*args):
        raise BackendUnavailable("hqq is not installed")
    monkeypatch.setattr(whole, "hqq_model", missing)
    out = tmp_path / "quality.json"
    assert bench(quality, *options, "--methods", "gguf,hqq-64,rtn", "--json", out) == 0
    said = capsys.readouterr().err
    assert [row["method"] for row in runner.load(out)["rows"]] == ["rtn"] and "hqq is not installed" in said and "of a .gguf file" in said


def test_rows_say_their_run_and_recipe(options, measured, tmp_path, monkeypatch, capsys):
    """A file that is added to: its head is of the last run, so each row says what made it; rows of another recipe are not mixed in."""
    values, out, older = runner.load(measured), tmp_path / "quality.json", tmp_path / "older.json"
    run = {"command": values["command"], "commit": values["commit"]["hash"], **{key: values["machine"][key] for key in RUN_OF_MACHINE}}
    assert all(run.items() <= row.items() for row in values["rows"])
    made = {row["method"]: row["recipe_settings"] for row in values["rows"] if "recipe_settings" in row}
    assert made == {"paper": dataclasses.asdict(Recipe.paper()), **dict.fromkeys(("gptvq", "gptvq+tune"), dataclasses.asdict(Recipe()))}
    out.write_text(measured.read_text())
    assert bench(quality, *options, "--methods", "paper", "--json", out) == 0 and runner.load(out)["rows"] == values["rows"]
    assert runner.load(out)["command"] != values["command"]
    monkeypatch.setitem(whole.SWITCHED, "gptvq", Recipe(damp=0.02))
    assert bench(quality, *options, "--methods", "rtn", "--json", out) == 1 and "(damp differ)" in capsys.readouterr().err
    kept = [{key: value for key, value in row.items() if key not in ("recipe_settings", *run)} for row in values["rows"]]
    older.write_text(json.dumps({**values, "rows": kept}))
    assert bench(quality, *options, "--methods", "rtn", "--json", older) == 0 and runner.load(older)["rows"] == kept
    other = [{**row, "seed": 1, "recipe_settings": {**made["gptvq"], "damp": 0.02}} for row in values["rows"] if row["method"] == "gptvq"]
    older.write_text(json.dumps({**values, "rows": other}))
    capsys.readouterr()
    assert bench(quality, "--table", out, older) == 1 and "rows of gptvq are of several recipes: damp differ" in capsys.readouterr().err


@pytest.mark.parametrize("text, family, model", [("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: x\n", 25, 17),
                                                 ("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", 0x41, 0xd0c), ("", None, None)])
def test_numbers_of_a_processor(tmp_path, text, family, model):
    (tmp_path / "cpuinfo").write_text(text)
    assert runner.processor_numbers(str(tmp_path / "cpuinfo")) == {"cpu_family": family, "cpu_model": model}
