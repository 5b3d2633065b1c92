"""Thousands of damaged checkpoints, in processes whose memory is capped: FormatError or a correct load."""
import json
import signal
import time

import pytest

from bench import mutations
from gptvq import FormatError


@pytest.mark.slow
@pytest.mark.timeout(1200)               # half a minute on an idle core
def test_random_damage_is_refused_or_harmless(tmp_path):
    mutations.main(["--count", "20000", "--json", str(tmp_path / "found.json")])
    rows = {row["damage"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    everything = rows.pop("all")
    assert sum(everything[outcome] for outcome in mutations.OUTCOMES) == 20_000 and everything["failed"] == 0
    assert len(rows) == 6 and all(row["refused"] > 200 for row in rows.values())
    assert everything["by hash"] > 1000 and everything["read"] > 1000 and everything["loaded"] > 20      # the damage was of all kinds
    assert everything["peak_growth_bytes_of_last_batch"] < 100e6


def test_a_hang_is_found(monkeypatch, tmp_path):
    """What blocks for good is one, what blocks once is not."""
    calls = []

    def judge(folder, whole):
        calls.append(folder)
        if whole or len(calls) == 1:
            time.sleep(60)
        return "read"

    monkeypatch.setattr(mutations, "judge", judge)
    before = signal.signal(signal.SIGALRM, mutations._hang)
    try:
        assert mutations._patiently(tmp_path, False, 1) == "read"
        with pytest.raises(mutations.Hang):
            mutations._patiently(tmp_path, True, 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(calls) == 4


def test_a_failure_ends_the_run(monkeypatch):
    """Whatever goes wrong in the process of a batch is an error of the whole run."""
    make = mutations.make

    def unsound(folder):
        make(folder)
        (folder / "config.json").write_text("{}")
        return 0

    monkeypatch.setattr(mutations, "make", unsound)
    with pytest.raises(FormatError, match="case the start: exit code 1: .*does not load"):
        mutations.main(["--count", "1"])
