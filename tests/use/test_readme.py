"""README.md is true: its Python runs, its commands parse, its targets exist, its table is what the code computes."""
import re
import shlex
import shutil
from pathlib import Path

import pytest
from measured_tables import check_table, marks

from gptvq import cli
from gptvq.config import PRESETS, VQConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The blocks run as they stand in a folder that holds my-model, calibration.txt and test.txt; only the sizes shrink.
SMALLER = {"samples=128": "samples=2", "sequence_length=2048": "sequence_length=64"}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def test_python_blocks_run_one_after_the_other(my_model, tmp_path, monkeypatch, capsys):
    for name in ("calibration.txt", "test.txt"):
        shutil.copy(my_model.parent / name, tmp_path)
    shutil.copytree(my_model, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("python"))
    for long, short in SMALLER.items():
        assert long in code
        code = code.replace(long, short)
    names = {}
    exec(compile(code, "python blocks of README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 3 and names["report"].bits_per_value == pytest.approx(float(printed[0].split()[0]))
    assert (tmp_path / "my-model-2.25" / "config.json").exists()


def test_command_lines_parse_and_targets_exist():
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines() if line.strip()]
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {"demo", "test"} <= {words[1] for words in commands if words[0] == "make"}
    for words in commands:
        if words[0] == "gptvq":
            args = cli.parser().parse_args(words[1:])
            if words[1] == "quantize" and args.config is None:
                cli.config_from(args)
        elif words[0] == "make":
            assert set(words[1:]) <= targets
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), words
        else:
            assert words == ["pip", "install", "."], f"no check for {words}: add one"
    assert {"quantize", "inspect", "eval", "generate"} <= {words[1] for words in commands if words[0] == "gptvq"}


def test_table_of_formats():
    rows = re.findall(r"^\| `([\w.-]+)` \| (\d) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|$", README, flags=re.M)
    assert {row[0] for row in rows} == {p for p in PRESETS if not p.endswith("-s64")}
    for preset, dim, centroids, weights, bits in rows:
        spec = VQConfig.preset(preset).spec(4096, 4096)
        assert (spec.dim, spec.codewords, spec.group_rows * spec.group_cols) == (int(dim), int(centroids), int(weights.replace(",", "")))
        assert f"{spec.bits_per_value:.3f}" == bits
        wide = VQConfig.preset(f"{preset}-s64").spec(4096, 4096)
        assert wide.scale_block == 64 and wide.group_rows * wide.group_cols == 2 * spec.group_rows * spec.group_cols


def test_tensors_of_a_checkpoint():
    section = README[README.index("## A checkpoint"):]
    named = {name for cell in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", section, flags=re.M) for name in re.findall(r"\w+", cell)}
    assert named == set(VQConfig.preset("2d-2.25-s64").spec(64, 64).buffer_shapes())


@pytest.mark.parametrize("mark", marks(README))
def test_measured_tables_are_those_of_the_result_files(mark, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_table(README, mark, capsys)


def test_there_are_measured_tables():
    assert len(marks(README)) >= 2
