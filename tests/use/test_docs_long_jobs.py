"""The pages in docs are true: their commands run, one after the other, and say what the text says."""
import re
import shlex
import shutil
from pathlib import Path

import pytest

import gptvq
from gptvq import cli

DOCS = Path(__file__).parents[2] / "docs"
SMALLER = ["--samples", "3", "--sequence-length", "32"]


@pytest.mark.slow
def test_the_commands_of_a_long_job(my_model, tmp_path, monkeypatch, capsys):
    for name in ("calibration.txt", "test.txt"):
        shutil.copy(my_model.parent / name, tmp_path)
    shutil.copytree(my_model, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "long-jobs.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) > 7 and all(words[0] == "gptvq" for words in commands)
    said = []
    for words in commands:
        short = [] if words[1] != "quantize" else SMALLER[2:] if "--calibration-samples" in words else SMALLER
        assert cli.main(words[1:] + short) == 0, capsys.readouterr().err
        said.append(capsys.readouterr().out)
    assert "is complete" in said[1] and "is complete" not in said[2]
    redone = next(out for words, out in zip(commands, said) if "--redo" in words)
    assert "model.layers.1.mlp.up_proj" in redone and not re.search(r"layers\.0\.\S+ .* bpv", redone)
    report = gptvq.Report.load("out")
    assert report.check["tokens"] == 4 * 32 and report.config.index_bits == 3 and not Path("out/journal").exists()
