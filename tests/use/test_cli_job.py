"""The options of long jobs on the command line: going on, starting over, redoing, the limit on the divergence."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gptvq
from gptvq import cli, cli_job

ENV = {**os.environ, "PYTHONPATH": str(Path(gptvq.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def words(model, out, *more):
    return [str(w) for w in ("quantize", model, out, "--calibration", model.parent / "calibration.txt", "--samples", 3,
                             "--sequence-length", 64, *more)]


def run(capsys, *line):
    capsys.readouterr()
    code = cli.main(words(*line))
    return code, *capsys.readouterr()


def test_limit_on_the_divergence(my_model, tmp_path, capsys):
    code, out, err = run(capsys, my_model, tmp_path / "o", "--max-kl", 1e-9)
    found = re.search(r"KL to the dense model (\d+\.\d{4}) nats per token on 256 tokens", err)
    assert code == 2 and found and "over the limit of 1e-09 (--max-kl)" in err and "written to" in out
    check = gptvq.Report.load(tmp_path / "o").check
    assert found[1] == f"{check['kl']:.4f}"
    code, out, err = run(capsys, my_model, tmp_path / "o", "--max-kl", 1.01 * check["kl"])     # complete: looked at once more
    assert code == 0 and "KL to the dense model" in out and "is complete" in out and not err
    code, out, err = run(capsys, my_model, tmp_path / "o", "--max-kl", 0.99 * check["kl"])
    assert code == 2 and "over the limit" in err
    code, out, err = run(capsys, my_model, tmp_path / "o", "--max-kl", 1, "--check", "none")
    assert code == 1 and "leave --check none away" in err
    code, out, _ = run(capsys, my_model, tmp_path / "unchecked", "--check", "none")
    assert code == 0 and "not compared with the dense model" in out
    code, out, _ = run(capsys, my_model, tmp_path / "unchecked", "--check", my_model.parent / "test.txt")
    assert code == 0 and gptvq.Report.load(tmp_path / "unchecked").check["kl"] > 0
    text = tmp_path / "short.txt"
    text.write_text((my_model.parent / "calibration.txt").read_text()[:70])
    code, _, err = run(capsys, my_model, tmp_path / "no text", "--calibration", text, "--max-kl", 1)
    assert code == 2 and "no text to compare" in err


def test_starting_over_and_redoing(my_model, tmp_path, capsys):
    out = tmp_path / "o"
    assert run(capsys, my_model, out)[0] == 0
    code, _, err = run(capsys, my_model, out, "--seed", 3)
    assert code == 1 and "config.seed was 0, is 3" in err and err.count("\n") == 1
    assert run(capsys, my_model, out, "--seed", 3, "--fresh")[0] == 0
    assert gptvq.Report.load(out).config.seed == 3
    code, printed, err = run(capsys, my_model, out, "--seed", 3, "--redo", "layers.1.*", "--calibration-samples", 5)
    lines = [line for line in printed.splitlines() if " bpv " in line]
    assert code == 0 and len(lines) == 7 and all(line.startswith("model.layers.1.") for line in lines), err
    assert gptvq.Report.load(out).redone["layers"] == ["layers.1.*"]
    code, _, err = run(capsys, my_model, out, "--redo", "layers.9.*")
    assert code == 1 and "matches no quantized layer" in err
    assert run(capsys, my_model, tmp_path / "p", "--no-journal", "--strict")[0] == 0
    code, _, err = run(capsys, my_model, tmp_path / "p", "--no-journal", "--fresh")
    assert code == 1 and "give one of them" in err


@pytest.mark.parametrize("value", ["-1", "nan", "much"])
def test_limits_are_numbers(value, my_model, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words(my_model, tmp_path / "o", "--max-kl", value))
    assert stop.value.code == 2 and "need a number of nats" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun(my_model, tmp_path, capsys):
    """Started by torchrun, two processes write what one does, and one of them speaks."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gptvq.cli",
                           *words(my_model, tmp_path / "two", "--device", "cpu")], env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1 and done.stdout.count("KL to the dense model") == 1
    assert run(capsys, my_model, tmp_path / "one")[0] == 0
    for name in ("model.safetensors", "config.json", "report.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_an_interrupted_command_goes_on(my_model, tmp_path, capsys):
    child = subprocess.Popen([sys.executable, "-m", "gptvq.cli", *words(my_model, tmp_path / "o", "--samples", 32)], env=ENV,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        for line in child.stdout:
            if line.startswith("block 2/2"):
                break
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and err == "\ngptvq: interrupted; 1 block is done: the same command goes on behind it\n"
    code, out, err = run(capsys, my_model, tmp_path / "o", "--samples", 32)
    assert code == 0 and "1 of 2 blocks of this job are done" in out and "block 1/2" not in out, err
    assert run(capsys, my_model, tmp_path / "whole", "--samples", 32)[0] == 0
    for name in ("model.safetensors", "config.json", "report.json", "tokenizer.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert json.loads((tmp_path / "o" / "times.json").read_text())["seconds"] > 0


def test_what_is_said_after_an_interrupt(tmp_path):
    class Arguments:
        out, fresh, no_journal = tmp_path, False, False

    assert cli_job.left(Arguments) == "nothing half-written was left behind"
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "journal.jsonl").write_text('{"job": {}}\n' + '{"block": 0}\n' * 12 + '{"blo')
    assert cli_job.left(Arguments) == "12 blocks are done: the same command goes on behind them"
    Arguments.fresh = True
    assert cli_job.left(Arguments) == "12 blocks are done: the same command without --fresh goes on behind them"
    (tmp_path / "journal" / "journal.jsonl").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert cli_job.left(Arguments) == f"nothing half-written was left behind; the checkpoint in {tmp_path} is complete"
