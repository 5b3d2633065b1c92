"""report.json round trip, its refusals, and what the progress display prints."""
import io
import json
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

import gptvq.report
from gptvq.config import VQConfig
from gptvq.errors import FormatError, GptvqError
from gptvq.report import Progress, Report, RichProgress, clock, layer_table, size
from gptvq.solver import LayerRecord


def record(name, rows, cols, error=0.02, **more):
    return LayerRecord(name, VQConfig.preset("2d-2.25").spec(rows, cols), error, **more)


def report(**changes):
    layers = [record("model.layers.0.q", 64, 96, 0.01, stages={"pass 1": 0.02}, repair="damp x 2", damp=0.03, tokens=512, seconds=1.5,
                     sha256="ab"), record("model.layers.0.down", 96, 128, 0.03)]
    return Report(**{"model_name": "tiny", "config": VQConfig.preset("2d-2.25", rules=(("*.o", None), ("*.v", "2d-3.125"))),
                     "layers": layers, "calibration": {"sha256": "cd", "samples": 4}, "dense_bytes": 36864, "other_bytes": 1000,
                     "seconds": 12.0, "stages": {"calibration": 3.0}, "warnings": ["one"], **changes})


def test_round_trip(tmp_path):
    before = report()
    path = before.save(tmp_path)
    after = Report.load(tmp_path)
    assert after == before and after.to_dict() == before.to_dict()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "times.json"] and path.name == "report.json"


def test_what_differs_between_runs_is_in_the_other_file(tmp_path):
    (tmp_path / "again").mkdir()
    a = report().save(tmp_path).read_text()
    slower = report(seconds=99.0, stages={"calibration": 80.0}, environment={"cores": 7})
    slower.layers[0].seconds = 50.0
    assert slower.save(tmp_path / "again").read_text() == a and "seconds" not in a
    assert Report.load(tmp_path / "again").layers[0].seconds == 50.0
    (tmp_path / "again" / "times.json").unlink()
    assert Report.load(tmp_path / "again").seconds == 0.0


def test_reports_with_their_times_inside_keep_loading(tmp_path):
    old = report().to_dict()
    for name in ("job", "check", "redone"):
        del old[name]
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert Report.load(tmp_path) == report()


def test_totals_are_sums_over_the_layers():
    r = report()
    weights = 64 * 96 + 96 * 128
    assert r.weights == weights and r.packed_bytes == sum(layer.spec.nbytes for layer in r.layers)
    totals = r.to_dict()["totals"]
    assert totals["bits_per_value"] == 8 * r.packed_bytes / weights and totals["mean_error"] == pytest.approx(0.02)
    assert [layer["name"] for layer in r.to_dict()["layers"]] == ["model.layers.0.q", "model.layers.0.down"]


def test_numbers_json_cannot_write_become_null(tmp_path):
    report(layers=[], stages={"x": math.inf}).save(tmp_path)
    values, times = (json.loads((tmp_path / name).read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
                     for name in ("report.json", "times.json"))
    assert times["stages"] == {"x": None} and values["totals"]["bits_per_value"] is None


@pytest.mark.parametrize("change, says", [
    (lambda text: text[:-40], "not valid JSON"), (lambda text: "[]", "need an object"),
    (lambda text: text.replace('"version": 1', '"version": 9', 1), "report version 9"),
    (lambda text: text.replace('"layers"', '"leyers"', 1), "KeyError: 'layers'"),
    (lambda text: text.replace('"index_bits": 2', '"index_bits": 7'), "index_bits=7"),
])
def test_damaged_files_are_named(tmp_path, change, says):
    path = report().save(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(GptvqError, match=says):
        Report.load(tmp_path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FormatError, match="report.json: cannot be read"):
        Report.load(tmp_path)
    with pytest.raises(GptvqError, match="cannot be written"):
        report().save(tmp_path / "absent")


def drive(progress):
    r = report()
    with progress:
        progress.start(r.weights, 1)
        progress.block(0, "model.layers.0")
        progress.stage("calibrating")
        for layer in r.layers:
            progress.layer(layer)
        progress.finish(r)


def test_plain_output_has_one_line_per_linear_and_no_control_codes():
    out = io.StringIO()
    drive(RichProgress(Console(file=out, force_terminal=False, width=60)))
    lines = out.getvalue().splitlines()
    assert all(char.isprintable() for char in out.getvalue().replace("\n", ""))
    assert lines[0].startswith("block 1/1 model.layers.0")
    q = next(line for line in lines if line.startswith("model.layers.0.q"))
    for part in ("64 x 96", f"{report().layers[0].bits_per_value:.3f} bpv", "1.000 %", "20.00 dB", "1.5 s", "damp x 2"):
        assert part in q
    assert sum("model.layers.0.down" in line for line in lines) == 1 and lines[-1] == "warning: one"


def test_terminal_output_is_live_and_leaves_the_terminal_clean():
    out = io.StringIO()
    progress = RichProgress(Console(file=out, force_terminal=True, width=100))
    drive(progress)
    assert "model.layers.0.q" in out.getvalue() and "\x1b[?25l" in out.getvalue()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")       # the cursor is back
    progress.start(10, 1)
    progress.close()
    progress.close()
    assert out.getvalue().endswith("\x1b[?25h") or out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_on_a_narrow_terminal_the_time_left_is_seen():
    out = io.StringIO()
    progress = RichProgress(Console(file=out, force_terminal=True, width=60))
    with progress:
        progress.start(2 * 64 * 96, 40)
        progress.block(0, "model.language_model.layers.0")
        progress.stage("solving model.language_model.layers.0.self_attn.q_proj")
        progress.layer(record("model.layers.0.q", 64, 96))
        progress._live.refresh()
    assert "50% | 0:00 left | block 1/40 model.language_model.layers.0" in out.getvalue()


def test_time_left_goes_by_weights(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(gptvq.report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = RichProgress(Console(file=io.StringIO()))
    progress.start(4 * 64 * 96, 2)
    assert math.isnan(progress.seconds_left())
    now[0] += 10
    progress.layer(record("a", 64, 96))
    assert progress.seconds_left() == pytest.approx(30)
    now[0] += 12
    assert progress.seconds_left() == pytest.approx(18)          # counts down until the next linear
    progress.layer(record("b", 64, 192))
    assert progress.seconds_left() == pytest.approx(22 / 3)
    now[0] += 100
    assert progress.seconds_left() == 0


def test_time_left_leaves_out_blocks_that_were_only_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(gptvq.report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = RichProgress(Console(file=io.StringIO()))
    progress.start(2 * 64 * 96, 3)
    progress.block(0, "kept")
    now[0] += 50
    progress.block(1, "first")
    now[0] += 10
    progress.layer(record("a", 64, 96))
    progress.block(2, "second")
    assert progress.seconds_left() == pytest.approx(10)


def test_silent_progress_accepts_everything(capsys):
    drive(Progress())
    assert capsys.readouterr() == ("", "")


def test_layer_table_lists_every_layer():
    out = io.StringIO()
    Console(file=out, width=160).print(layer_table(report()))
    assert "model.layers.0.q" in out.getvalue() and "2d K16" in out.getvalue() and "1.000" in out.getvalue()


def test_units():
    assert [size(n) for n in (0, 999, 1500, 2_000_000, 5e12)] == ["0 B", "999 B", "1.5 kB", "2.0 MB", "5000.0 GB"]
    assert [clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
