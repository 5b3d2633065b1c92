"""bench.ranks on a tiny model: stages of one process and of two, whose files are the same bytes."""
import pytest

from bench import ranks, runner
from gptvq.errors import GptvqError

TINY = ["--quick", "--hidden", "64", "--layers", "1", "--samples", "8", "--sequence-length", "32", "--rounds", "1"]


def test_rows(tmp_path, capsys):
    ranks.main([*TINY, "--json", str(tmp_path / "ranks.json")])
    printed = capsys.readouterr().out
    rows = runner.load(str(tmp_path / "ranks.json"))["rows"]
    sent = {row["ranks"]: row["bytes"] for row in rows if "bytes" in row}
    assert set(sent) == {1, 2} and sent[1] == 0 < sent[2]
    times = {(row["ranks"], row["stage"]): row for row in rows if "seconds" in row}
    for n in (1, 2):
        stages = [row for (of, stage), row in times.items() if of == n and stage != "all"]
        assert {"passes", "sums", "whole", "rows", "exchange"} <= {row["stage"] for row in stages}
        assert times[n, "all"]["seconds"] == pytest.approx(sum(row["seconds"] for row in stages))
        assert times[n, "rows"]["cpu_seconds"] > 0 and times[n, "sums"]["cpu_seconds"] > 0
    assert times[2, "rows"]["ratio"]["seconds"] == pytest.approx(times[2, "rows"]["seconds"] / times[1, "rows"]["seconds"])
    ranks.main(["--table", str(tmp_path / "ranks.json")])
    assert capsys.readouterr().out == printed and printed.count("\n") == 2 + len({stage for _, stage in times})


def test_other_bytes_are_no_result(tmp_path, monkeypatch):
    found = iter("ab")
    monkeypatch.setattr(ranks, "run", lambda args, place, n: {"stages": {"rows": [1.0, 1.0]}, "sent": 0, "sha256": next(found)})
    with pytest.raises(GptvqError, match="wrote other bytes than one"):
        ranks.main([*TINY, "--json", str(tmp_path / "ranks.json")])
