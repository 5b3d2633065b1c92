"""kill -9 at any instant, the same call again: every file as an uninterrupted run writes it."""
import hashlib
import random
import re
import shutil
import signal

import pytest
from job.forks import Forks

KILLS = 50


@pytest.fixture(scope="module")
def whole(forks, folder, tmp_path_factory):
    """{"folder" or "module": what an uninterrupted run of a model from the disk, or in memory, writes; its steps, its seconds}."""
    found = {}
    for kind, model in (("folder", folder), ("module", "llama")):
        out = tmp_path_factory.mktemp("whole") / "out"
        result = forks.run(model=model, out=out)
        assert result["error"] is None
        found[kind] = {"files": files(out), "steps": result["steps"], "seconds": result["seconds"]}
    return found


def files(out):
    """{name: hash} of all but the times, folders included."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            for path in sorted(out.iterdir()) if path.name != "times.json"}


def test_what_a_run_writes(whole):
    for kind in whole.values():
        assert set(kind["files"]) == {"config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
                                      "report.json"}
    assert {k: v for k, v in whole["folder"]["files"].items() if k != "report.json"} == {
        k: v for k, v in whole["module"]["files"].items() if k != "report.json"}        # the report names the model


def test_every_step_on_the_disk_may_be_the_last(forks, whole, tmp_path):
    """Death at each write (halfway), fsync, rename, removal, new folder: from the first to the last of a whole run."""
    steps = whole["module"]["steps"]
    assert steps > 60
    for fatal in range(1, steps + 1):
        out = tmp_path / str(fatal)
        died = forks.run(model="llama", out=out, fatal=fatal)
        assert died["signal"] == signal.SIGKILL, fatal
        again = forks.run(model="llama", out=out)
        assert again["signal"] == 0 and again["error"] is None, (fatal, again)
        assert files(out) == whole["module"]["files"], fatal
        shutil.rmtree(out)
    assert forks.run(model="llama", out=tmp_path / "none", fatal=steps + 1)["signal"] == 0


@pytest.mark.slow
def test_killed_at_random_again_and_again(forks, whole, folder, tmp_path):
    rng, kills, finished, resumed = random.Random(17), 0, 0, 0
    seconds = whole["folder"]["seconds"]
    while kills < KILLS:
        out = tmp_path / f"out{finished}"
        while True:
            going_on = (out / "journal" / "journal.jsonl").exists() and (out / "journal" / "journal.jsonl").read_bytes().count(b"\n") > 1
            result = forks.run(model=folder, out=out, kill_after=rng.uniform(0, 1.1 * seconds))
            if result["signal"] == 0:
                break
            kills, resumed = kills + 1, resumed + going_on
        assert result["error"] is None and files(out) == whole["folder"]["files"]
        finished += 1
        shutil.rmtree(out)
    assert finished and resumed


def test_a_full_disk_loses_nothing(forks, whole, folder, tmp_path):
    """RLIMIT_FSIZE stands for the disk: too small for a block's file, for its activations, for the checkpoint."""
    out, failed = tmp_path / "out", []
    for limit in (500, 2_000, 15_000, 60_000):
        result = forks.run(model=folder, out=out, file_limit=limit)
        assert result["error"].startswith("ConfigError") and "File too large" in result["error"] and str(out) in result["error"], result
        assert not (out / "config.json").exists()
        failed.append(re.search(r"(\S+): (?:cannot be written|writing)", result["error"])[1].removeprefix(str(out)))
    assert failed == ["/journal/journal.jsonl", "/journal/block-00000.safetensors", "/journal/hidden-00000.safetensors", ""]
    again = forks.run(model=folder, out=out)
    assert again["error"] is None and files(out) == whole["folder"]["files"]
    for resume in ("fresh", "never"):                       # what was there stays until the new tensors are on the disk
        result = forks.run(model=folder, out=out, file_limit=60_000, arguments={"resume": resume, "overwrite": True})
        kept = "none of it was kept, but " + "what the journal holds is, and " * (resume == "fresh") + "the checkpoint that was there is. "
        assert kept in result["error"], result
        assert {name: found for name, found in files(out).items() if name != "journal"} == whole["folder"]["files"]


def test_two_writers(forks, folder, tmp_path):
    """The second one is refused and does no harm; the lock of a dead process stops nobody."""
    out, other = tmp_path / "out", Forks()
    try:
        other.run(model=folder, out=tmp_path / "ready")
        forks.start(model=folder, out=out, samples=64)
        while not (out / "journal" / "journal.jsonl").exists():
            pass
        refused = other.run(model=folder, out=out, samples=64)
        assert refused["error"].startswith("ConfigError") and "is writing this job" in refused["error"], refused
        assert forks.result()["error"] is None
    finally:
        other.close()
    dead = forks.run(model=folder, out=tmp_path / "dead", fatal=30)
    assert dead["signal"] == signal.SIGKILL and (tmp_path / "dead" / "journal" / "lock").exists()
    assert forks.run(model=folder, out=tmp_path / "dead")["error"] is None
