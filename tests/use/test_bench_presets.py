"""bench.presets on a tiny model: what a row says is what quantize, perplexity and the files say."""
import pytest

import gptvq
from bench import presets, runner
from gptvq.calibration import read_tokens


def test_rows(my_model, tmp_path, capsys):
    files = [str(my_model.parent / name) for name in ("calibration.txt", "test.txt")]
    options = ["--model", str(my_model), "--calibration", files[0], "--text", files[1], "--samples", "2", "--sequence-length", "32",
               "--window", "64", "--max-windows", "3", "--tokens", "3", "--repeats", "2", "--json", str(tmp_path / "presets.json")]
    presets.main([*options, "--presets", "2d-2.25"])
    first = runner.load(str(tmp_path / "presets.json"))["rows"]
    capsys.readouterr()
    presets.main([*options, "--presets", "2d-2.25,1d-4.125"])
    printed = capsys.readouterr().out
    found = runner.load(str(tmp_path / "presets.json"))
    dense, two, four = found["rows"]
    assert found["rows"][:2] == first                   # not measured again
    assert dense["preset"] is None and dense["bits_per_value"] == 16 and found["settings"]["windows"] == 3
    report = gptvq.quantize(my_model, tmp_path / "out", "2d-2.25", calibration=files[0], samples=2, sequence_length=32, dtype="bfloat16")
    assert two["bits_per_value"] == report.bits_per_value and two["linear_bytes"] == report.packed_bytes < four["linear_bytes"]
    assert two["total_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    tokens = read_tokens(files[1], report.tokenizer)
    assert two["perplexity"] == pytest.approx(gptvq.perplexity(gptvq.load(tmp_path / "out", "cpu"), tokens, 64, 3))
    assert all(row["tokens_per_second"] > 0 and row["speedup"] > 0 for row in (two, four))
    presets.main(["--table", str(tmp_path / "presets.json")])
    assert capsys.readouterr().out == printed and printed.count("\n") == 5


def test_a_preset_of_the_head(my_model, tmp_path, capsys):
    files = [str(my_model.parent / name) for name in ("calibration.txt", "test.txt")]
    presets.main(["--model", str(my_model), "--calibration", files[0], "--text", files[1], "--samples", "2", "--sequence-length", "32", "--window", "64",
                  "--max-windows", "3", "--tokens", "3", "--repeats", "2", "--json", str(tmp_path / "presets.json"), "--presets",
                  "2d-2.25,2d-2.25+2d-4.125"])
    _, plain, headed = runner.load(str(tmp_path / "presets.json"))["rows"]
    assert headed["linear_bytes"] > plain["linear_bytes"] and "| 2d-2.25, head 2d-4.125 |" in capsys.readouterr().out
    with pytest.raises(gptvq.ConfigError, match="4.5d"):
        presets.main(["--calibration", files[0], "--text", files[1], "--presets", "2d-2.25+4.5d"])


def test_a_missing_text_is_refused_before_any_work(my_model):
    with pytest.raises(gptvq.ConfigError, match="--text: got None"):
        presets.main(["--model", str(my_model), "--calibration", str(my_model.parent / "calibration.txt")])
