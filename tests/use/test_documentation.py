"""The documentation is true: its commands parse, its Python runs, its reader of the format reads every format, its links lead somewhere."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gptvq
from gptvq import cli
from measured_tables import check_table, marks
from packed_cases import SPECS, random_weight, spec_id
from gptvq.spec import FORMATS, LAYOUT_VERSION, QuantSpec

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
WITH_SVD = [QuantSpec(40, 50, 1, bits, 16, 32, 16 * (bits - 2), 2) for bits in (2, 3, 4)]


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / name).read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def reader():
    """Names of the reader in docs/format.md."""
    names = {}
    (code,) = blocks("format.md", "python")
    exec(compile(code, "docs/format.md", "exec"), names)
    return names


@pytest.mark.parametrize("spec", SPECS + WITH_SVD, ids=spec_id)
def test_the_reader_reads_every_format(reader, spec):
    vq = random_weight(spec)
    parts = {name: t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for name, t in vq.buffers.items()}
    got = reader["weight_of"](spec.to_dict(), parts.__getitem__)
    assert got.dtype == np.float32 and np.array_equal(got, vq.dequantize().numpy())


def test_the_reader_reads_a_checkpoint(reader, my_model, tmp_path):
    rules, quick = (("*.v_proj", "1d-3.125"), ("*.up_proj", None)), gptvq.Recipe(em_iterations=3, passes=1)
    gptvq.quantize(my_model, tmp_path / "out", gptvq.VQConfig.preset("2d-2.25-s64", rules=rules, recipe=quick),
                   calibration=my_model.parent / "calibration.txt", samples=2, sequence_length=32)
    model = gptvq.load(tmp_path / "out", "cpu")
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    for name in layers:
        assert np.array_equal(reader["read_layer"](tmp_path / "out", name), model.get_submodule(name).dequantize().numpy()), name
    assert len(layers) == 12


def test_the_format_names_what_is_stored():
    text = (ROOT / "docs" / "format.md").read_text()
    spec = QuantSpec(32, 32, 1, 3, 16, 32, 16, 2)
    for name in [*spec.to_dict(), *spec.buffer_shapes(), *QuantSpec(32, 32, 2, 2, 16, 32).buffer_shapes()]:
        assert re.search(rf"`(L\.)?{name}`", text), name
    assert f"Layout version {LAYOUT_VERSION}." in text and " ".join(f"({d},{b})" for d, b in sorted(FORMATS)) in text


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_commands_parse_and_links_lead_somewhere(path):
    for line in (line for block in blocks(path.name, "bash") for line in block.splitlines() if line.strip()):
        words = shlex.split(line, comments=True)
        words = words[:words.index(">")] if ">" in words else words
        if words[0] == "gptvq":
            args = cli.parser().parse_args(words[1:])
            if words[1] == "quantize":
                cli.config_from(args)
        else:
            assert words == ["pip", "install", "."], line
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for place in re.findall(r"`((?:gptvq|csrc|tests|bench)/[\w./]+)`", path.read_text()):
        assert (ROOT / place).exists(), place


@pytest.mark.parametrize("path, mark", [(path, mark) for path in DOCS for mark in marks(path.read_text(encoding="utf-8"))],
                         ids=lambda value: getattr(value, "name", None))
def test_measured_tables_are_those_of_the_result_files(path, mark, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_table(path.read_text(encoding="utf-8"), mark, capsys)


def test_python_of_the_quick_start_runs(my_model, tmp_path, monkeypatch, capsys):
    for name in ("calibration.txt", "test.txt"):
        shutil.copy(my_model.parent / name, tmp_path)
    shutil.copytree(my_model, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("quickstart.md", "python"))
    assert code.count("samples=128, sequence_length=2048") == 2
    exec(compile(code.replace("samples=128, sequence_length=2048", "samples=2, sequence_length=32"), "docs/quickstart.md", "exec"), {})
    assert "'kl':" in capsys.readouterr().out and (tmp_path / "my-model-2.25" / "report.html").exists()
    assert (tmp_path / "my-model-dense" / "model.safetensors").exists()


def test_the_example_runs(my_model, tmp_path):
    words = [my_model, my_model.parent / "calibration.txt", my_model.parent / "test.txt", tmp_path, "--samples", 2, "--sequence-length", 64]
    run = subprocess.run([sys.executable, ROOT / "examples" / "quantize_and_use.py", *map(str, words)], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(Path(gptvq.__file__).parents[1])})
    assert run.returncode == 0, run.stderr
    assert re.search(r"KL \d+\.\d{4} nats", run.stdout) and (tmp_path / "packed" / "report.html").exists()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_names_of_the_package_are_there():
    """`gptvq.a.b(...)` in the text is what `import gptvq` alone gives."""
    names = {name for path in DOCS for name in re.findall(r"`(gptvq(?:\.\w+)+)\(", path.read_text(encoding="utf-8"))}
    run = subprocess.run([sys.executable, "-c", "\n".join(["import gptvq", *sorted(names)])], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(Path(gptvq.__file__).parents[1])})
    assert names and run.returncode == 0, run.stderr


def test_changes_name_the_version():
    assert f"## {gptvq.__version__}" in (ROOT / "CHANGELOG.md").read_text()
