"""bench.plan on a tiny model: both commands run as processes of their own, and every prediction has its outcome."""
import json
import subprocess
import sys

from bench_runs import bench

from bench import plan

POPEN = subprocess.Popen


def test_predictions_and_outcomes(my_model, tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert bench(plan, "--model", my_model, "--calibration", my_model.parent / "calibration.txt", "--samples", 4, "--sequence-length", 64,
                 "--json", file) == 0
    printed, values = capsys.readouterr().out, json.loads(file.read_text())
    rows = {row["quantity"]: row for row in values["rows"]}
    assert rows["bits per value"]["predicted"] == rows["bits per value"]["taken"]
    assert 0.9 < rows["tensor files, bytes"]["ratio"]["taken"] < 1          # beside the tensors a file holds its header
    # A child's peak counts what its parent held when it was started: in the tests' own process, far more than a tiny model takes.
    assert 0 < rows["peak RAM, bytes"]["ratio"]["taken"] < 2
    assert {f"seconds, {stage}" for stage in ("load", "survey", "embed", "forward", "hessians", "solve", "journal")} <= set(rows)
    assert all(row["taken"] > 0 and f"| {name} " in printed for name, row in rows.items() if "taken" in row)
    assert rows["process: quantize"]["cpu_seconds"] > 0 and values["settings"]["samples"] == 4


def test_each_process_is_measured_by_itself(monkeypatch):
    """What takes little is said to, also after one that took much.  A child's peak begins at what its parent holds."""
    monkeypatch.setattr(plan.subprocess, "Popen", lambda command, **how: POPEN([sys.executable, "-c", command[-1]], **how))
    held = plan._process(["pass"])["peak_ram"]
    large = plan._process([f"b'x' * {held + (100 << 20)}; sum(range(10 ** 7))"])
    small = plan._process(["pass"])
    assert large["peak_ram"] > small["peak_ram"] + (50 << 20) and large["cpu_seconds"] > small["cpu_seconds"] > 0


def test_a_command_that_fails_is_an_error(my_model, tmp_path, capsys):
    assert bench(plan, "--model", tmp_path / "absent", "--calibration", my_model.parent / "calibration.txt") == 1
    assert "gptvq plan: exit code 1" in capsys.readouterr().err
