"""bench, export and completion from the command line."""
import json
import re
import shutil
import subprocess

import pytest

import gptvq
from gptvq import cli, kernel_speed, ops
from gptvq.completion import script
from gptvq.config import PRESETS


def test_bench_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_speed, "RING_BYTES", 1 << 16)
    monkeypatch.setattr(kernel_speed, "SAMPLES", 1)
    words = ["bench", "--shapes", "64x96,33x32", "--presets", "2d-2.25,2d-3.125-s64", "--threads", "1"]
    assert cli.main([*words, "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["name"] for row in rows[:7]] == ["gptvq 2d-2.25 a16", "gptvq 2d-2.25 a8", "gptvq 2d-3.125-s64 a16", "gptvq 2d-3.125-s64 a8",
                                                 "torch bfloat16", "torch float32", "read"] and len(rows) == 14
    for row in rows:
        assert row["name"] == "read" or row["microseconds"] > 0 and row["gb_per_second"] * row["microseconds"] * 8e3 == pytest.approx(
            row["bits"] * row["shape"][0] * row["shape"][1])
    assert next(r for r in rows if r["name"] == "torch bfloat16")["speedup"] == 1
    assert rows[0]["bits"] == gptvq.VQConfig.preset("2d-2.25").spec(64, 96).bits_per_value
    assert cli.main(words) == 0 and "of read" in capsys.readouterr().out


def test_bench_times_no_preparation_and_ends(monkeypatch):
    """Every layer of the ring was called before; of the smallest shapes there are not as many as would fill it."""
    prepared, timed, times, prepare = [], [], kernel_speed._times, ops.prepare_linear
    monkeypatch.setattr(ops, "prepare_linear", lambda *args: prepared.append(1) or prepare(*args))
    monkeypatch.setattr(kernel_speed, "_times", lambda *args: timed.append(len(prepared)) or times(*args))
    monkeypatch.setattr(kernel_speed, "MOST_COPIES", 600)
    monkeypatch.setattr(kernel_speed, "SAMPLES", 2)
    kernel_speed.measure([(1, 1)], ["2d-2.25"])
    assert len(prepared) == timed[0] >= 600


@pytest.mark.parametrize("words, says", [(["--shapes", "64"], "ROWSxCOLUMNS"), (["--presets", "3d-2"], "'3d-2'"),
                                         (["--activations", "a4"], "'a4'")])
def test_bench_refuses(words, says, capsys):
    assert cli.main(["bench", *words]) == 1 and says in capsys.readouterr().err


def test_export_command(my_model, tmp_path, capsys):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    assert cli.main(["quantize", str(my_model), str(packed), "--calibration", str(my_model.parent / "calibration.txt"), "--samples", "2",
                     "--sequence-length", "32"]) == 0
    assert cli.main(["export", str(packed), "--dense", str(dense)]) == 0 and "loads without gptvq" in capsys.readouterr().out
    assert (dense / "tokenizer.json").exists() and not (dense / "report.json").exists() and not (dense / "report.html").exists()
    assert cli.main(["export", str(packed), "--dense", str(dense)]) == 1 and "--overwrite" in capsys.readouterr().err
    assert cli.main(["export", str(packed), "--dense", str(dense), "--overwrite", "--dtype", "float16"]) == 0
    assert json.loads((dense / "config.json").read_text())["dtype"] == "float16"


def complete(shell_script, *words):
    """What bash offers for the last of `words`."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = f'{shell_script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _gptvq; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run([shutil.which("bash"), "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completion(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert cli.main(["completion", "bash"]) == 0
    text = capsys.readouterr().out
    assert complete(text, "gptvq", "e") == ["eval", "export"]
    assert complete(text, "gptvq", "quantize", "--cal") == ["--calibration", "--calibration-samples"]
    assert set(complete(text, "gptvq", "quantize", "m", "--preset", "4d")) == {name for name in PRESETS if name.startswith("4d")}
    assert complete(text, "gptvq", "quantize", "mod") == ["model.gguf"]
    assert complete(text, "gptvq", "completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(shell, tmp_path):
    path = tmp_path / "script"
    path.write_text(script(cli.parser(), shell))
    assert len(re.findall("quantize", path.read_text())) > 3
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shutil.which(shell), "-n", str(path)], check=True)
