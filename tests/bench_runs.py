"""A bench as a developer runs it, and what its result file must hold."""
import json
import re

from bench import runner


def bench(module, *args):
    """Exit code of a bench in this process."""
    return runner.run(module.main, [str(arg) for arg in args])


def check_file(path, name):
    """What every result file must hold; returns its rows."""
    values = json.loads(path.read_text())
    assert list(values) == list(runner.FIELDS)
    assert values["command"].startswith(f"python -m bench.{name} ")
    assert str(path.parent) not in path.read_text(), "a path of this machine"
    assert values["machine"]["cores"] >= 1 and values["machine"]["memory"] > 1e8 and set(values["machine"]) == {
        "cpu", "cpu_family", "cpu_model", "architecture", "kernels", "cores", "memory", "gpu"}
    assert set(values["commit"]) == {"hash", "dirty"}
    assert set(values["versions"]) == {"python", "torch", "transformers", "gptvq", "numpy"} and all(values["versions"].values())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", values["date"])
    for row in values["rows"]:
        assert {"operation", "method", "preset", "format", "device", "threads"} <= set(row)
    return values["rows"]
