"""bench.quantize as a developer runs it: on a tiny model and on a random layer."""
import json
import os

import pytest
import torch
from bench_runs import bench, check_file

from bench import quantize
from gptvq import solver
from gptvq.backends import native
from gptvq.hessian import Hessian

pytestmark = pytest.mark.skipif(not native.serves(torch.device("cpu")), reason="gptvq._C is not built here")
NAMES = [stage for _, _, stage in quantize.STAGES]


def check(rows, shape):
    """The rows of the stages and of the two backends; returns the former."""
    stages, solves = [row for row in rows if row["operation"] == "quantize"], [row for row in rows if row["operation"] == "solve"]
    assert [row["stage"] for row in stages] == [*dict.fromkeys(NAMES), "all"]
    total = stages[-1]["seconds"]
    assert sum(row["seconds"] for row in stages[:-1]) == pytest.approx(total) and stages[-1]["share"] == 1
    assert all(row["seconds"] > 0 for row in stages)
    assert sum(row["cpu_seconds"] for row in stages[:-1]) == pytest.approx(stages[-1]["cpu_seconds"]) and stages[-1]["cpu_seconds"] > 0
    fast, slow = solves
    assert [fast["method"], slow["method"]] == ["native", "reference"] and fast["shape"] == slow["shape"] == shape
    assert fast["median_seconds"] > 0 and fast["speedup"]["reference"] > 0 and slow["speedup"] == {}
    assert fast["ratio"]["reference"] == pytest.approx(fast["error"] / slow["error"]) and 0.7 < fast["ratio"]["reference"] < 1.4
    return stages


def test_real_layers(my_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GPTVQ_BACKEND", "native")
    threads, before = torch.get_num_threads(), (solver.solve, Hessian.add)
    for choice, share in ((["--blocks", "1"], 0.5), (["--all"], 1.0)):
        out = tmp_path / "q.json"
        assert bench(quantize, *choice, "--model", my_model, "--calibration", my_model.parent / "calibration.txt", "--samples", 3,
                     "--sequence-length", 64, "--threads", 1, "--repeats", 1, "--json", out) == 0
        stages = check(check_file(out, "quantize"), [32, 64])
        assert all(row["model_seconds"] == pytest.approx(row["seconds"] / share) for row in stages)
        assert stages[0]["layers"] == 14 * share and {row["threads"] for row in stages} == {1}
        assert json.loads(out.read_text())["settings"]["model"] == my_model.name
        assert "| EM " in capsys.readouterr().out
    assert torch.get_num_threads() == threads and (solver.solve, Hessian.add) == before and os.environ["GPTVQ_BACKEND"] == "native"


def test_a_random_layer(tmp_path, capsys):
    out = tmp_path / "q.json"
    assert bench(quantize, "--shape", "48x96", "--preset", "1d-2.25", "--samples", 2, "--sequence-length", 200, "--repeats", 1,
                 "--json", out) == 0
    stages = check(check_file(out, "quantize"), [48, 96])
    assert {row["model_seconds"] for row in stages} == {None} and stages[0]["shape"] == [48, 96] and stages[0]["layers"] == 1
    assert bench(quantize, "--shape", "48x96", "--preset", "9d") == 1 and "unknown preset" in capsys.readouterr().err


def test_a_stage_does_not_count_those_it_calls(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(quantize.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(quantize.time, "process_time", lambda: 0)
    stages = quantize.Stages()
    inner = stages._timed(lambda: None, "EM")
    stages._timed(lambda: (inner(), inner()), "column passes")()
    assert stages.seconds["EM"] == 2 and stages.seconds["column passes"] == 3
