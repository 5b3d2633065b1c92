"""The command line on a tiny model: what it prints, writes and returns."""
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gptvq
from gptvq import cli
from gptvq.config import ACTIVATIONS, PRESETS, VQConfig
from gptvq.errors import ConfigError

COMMANDS = ("quantize", "eval", "generate", "inspect", "demo")
LINEARS = [f"model.layers.{i}.{name}" for i in range(2) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
ENV = {**os.environ, "PYTHONPATH": str(Path(gptvq.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def run(capsys, *words):
    """(exit code, stdout, stderr) of one command line in this process."""
    capsys.readouterr()
    code = cli.main([str(w) for w in words])
    return code, *capsys.readouterr()


def small(model, out, *more):
    return "quantize", model, out, "--calibration", model.parent / "calibration.txt", "--samples", 3, "--sequence-length", 64, *more


@pytest.fixture(scope="module")
def packed(my_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    assert cli.main([str(w) for w in small(my_model, out, "--preset", "2d-3.125", "--rule", "*.down_proj=2d-2.25",
                                           "--rule", "*.0.self_attn.v_proj=keep")]) == 0
    return out


def test_help_has_examples_that_parse(capsys):
    for words in ([], *([c] for c in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and all(c in text for c in (words or COMMANDS))
        assert not words or re.search(rf"examples?:\n  gptvq {words[0]}", text)


def test_help_is_quick():
    code = "import sys, gptvq.cli as c; c.parser().format_help(); print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "gptvq", "--version"], env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"gptvq {gptvq.__version__}\n")


@pytest.mark.parametrize("words", [[], ["squeeze"], ["quantize", "m"], ["quantize", "m", "o"], ["eval", "m"],
                                   ["quantize", "m", "o", "--calibration", "t", "--samples", "0"],
                                   ["quantize", "m", "o", "--calibration", "t", "--rule", "*.v_proj"]])
def test_wrong_usage_is_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2 and "usage: gptvq" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("gptvq ")


def test_options_become_the_configuration():
    args = cli.parser().parse_args(["quantize", "m", "o", "--calibration", "t", "--preset", "1d-2.25-s64", "--method", "paper", "--seed", "5",
                                    "--rule", "*.a=b=2d-3.125", "--rule", "*.b=keep"])
    config = cli.config_from(args)
    assert config.rules == (("*.a=b", "2d-3.125"), ("*.b", None)) and config.seed == 5 and config.recipe.method == "paper"
    weighted = cli.config_from(cli.parser().parse_args(["quantize", "m", "o", "--calibration", "t", "--token-weights", "loss"]))
    assert weighted.recipe.token_weights == "loss" and config.recipe.token_weights == ""
    learning = cli.config_from(cli.parser().parse_args(["quantize", "m", "o", "--calibration", "t", "--distill", "2"]))
    assert (learning.recipe.distill, config.recipe.distill) == (2, 0)
    assert config.scale_block == 64 and (config.dim, config.group_size) == (1, VQConfig.preset("1d-2.25").group_size * 2)


def test_unknown_preset_lists_the_presets(capsys, tmp_path):
    code, out, err = run(capsys, "quantize", "m", tmp_path / "o", "--preset", "3d-2", "--calibration", "t")
    assert code == 1 and err.startswith("gptvq: error: ") and all(p in err for p in PRESETS) and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_quantize_prints_a_line_per_linear(my_model, tmp_path, capsys):
    code, out, err = run(capsys, *small(my_model, tmp_path / "o"))
    assert code == 0, err
    lines = {line.split()[0]: line for line in out.splitlines() if " bpv " in line}
    assert list(lines) == LINEARS
    assert all(re.search(r"\d+ x \d+ +\d\.\d{3} bpv +\d+\.\d{3} % +-?\d+\.\d\d dB +\d+\.\d s", line) for line in lines.values())
    assert {"config.json", "report.json"} <= {p.name for p in (tmp_path / "o").iterdir()}
    code, out, err = run(capsys, *small(my_model, tmp_path / "o"))
    assert code == 0 and f"{tmp_path / 'o'} is complete" in out
    code, _, err = run(capsys, *small(my_model, tmp_path / "o", "--preset", "4d-2.25"))
    assert code == 1 and str(tmp_path / "o") in err and "config.dim was 2, is 4" in err and "--fresh" in err
    assert run(capsys, *small(my_model, tmp_path / "o", "--overwrite", "--preset", "4d-2.25"))[0] == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["config"]["dim"] == 4


def test_inspect(packed, capsys):
    code, out, _ = run(capsys, "inspect", packed)
    assert code == 0
    kept = "model.layers.0.self_attn.v_proj"
    assert [line.split()[0] for line in out.splitlines() if " model.layers." in line] == [n for n in LINEARS if n != kept]
    assert re.search(r"down_proj .* 2d K16 ", out) and re.search(r"up_proj .* 2d K64 ", out) and "13 linears" in out
    code, out, _ = run(capsys, "inspect", packed, "--json", "-")
    values = json.loads(out)
    assert code == 0 and values["totals"]["bits_per_value"] == pytest.approx(8 * values["totals"]["packed_bytes"] / values["totals"]["weights"])
    assert sum(layer["nbytes"] for layer in values["layers"]) == values["totals"]["packed_bytes"]


def test_eval_dense_and_packed(my_model, packed, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gptvq.evaluate import perplexity
    text = my_model.parent / "test.txt"
    found = {}
    for name, model in (("dense", my_model), ("packed", packed)):
        code, out, err = run(capsys, "eval", model, "--text", text, "--window", 64, "--max-windows", 5, "--json", tmp_path / name)
        found[name] = json.loads((tmp_path / name).read_text())
        assert code == 0 and f"perplexity {found[name]['perplexity']:.3f}  (5 windows of 64 tokens" in out, err
    tokens = AutoTokenizer.from_pretrained(my_model)(text.read_text(), return_tensors="pt").input_ids[0]
    dense = AutoModelForCausalLM.from_pretrained(my_model, dtype="auto")
    assert found["dense"]["perplexity"] == pytest.approx(perplexity(dense, tokens, 64, 5), rel=1e-5)
    assert found["packed"]["perplexity"] == pytest.approx(perplexity(gptvq.load(packed), tokens, 64, 5), rel=1e-5)
    assert found["packed"]["perplexity"] != found["dense"]["perplexity"]


def test_quantize_takes_the_dtype(my_model, tmp_path, capsys):
    """What stays dense is stored in it, and a checkpoint opens in it."""
    from safetensors.torch import load_file
    assert run(capsys, *small(my_model, tmp_path / "o", "--dtype", "float16"))[0] == 0
    stored = load_file(tmp_path / "o" / "model.safetensors")
    assert {str(stored[name].dtype) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")} == {"torch.float16"}
    assert gptvq.load(tmp_path / "o").dtype == stored["model.norm.weight"].dtype


def test_eval_takes_the_activations(my_model, packed, tmp_path, capsys):
    from gptvq.calibration import read_tokens
    from gptvq.evaluate import perplexity
    from gptvq.hf import open_model
    text, found = my_model.parent / "test.txt", {}
    for kind in ACTIVATIONS:
        assert run(capsys, "eval", packed, "--text", text, "--window", 64, "--max-windows", 5, "--activations", kind,
                   "--json", tmp_path / kind)[0] == 0
        found[kind] = json.loads((tmp_path / kind).read_text())["perplexity"]
        model, tokenizer = open_model(packed, activations=kind)
        assert found[kind] == perplexity(model, read_tokens(str(text), tokenizer, "--text"), 64, 5)
    assert len(set(found.values())) == 3 and abs(found["a8"] - found["fp32"]) > abs(found["a16"] - found["fp32"])


def test_generate_streams_what_the_model_says(packed, capsys):
    from transformers import AutoTokenizer
    tokenizer, model = AutoTokenizer.from_pretrained(packed), gptvq.load(packed)
    ids = tokenizer("tones rise", return_tensors="pt").input_ids
    want = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    code, out, err = run(capsys, "generate", packed, "tones rise", "--max-new-tokens", 8)
    assert code == 0 and out.strip() == want.strip(), err
    sampled = [run(capsys, "generate", packed, "tones", "--temperature", 1.5, "--seed", s, "--max-new-tokens", 20)[1] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_chat_uses_the_template(my_model, tmp_path, capsys):
    from transformers import AutoTokenizer
    assert run(capsys, "generate", my_model, "hi", "--chat")[::2] == (1, "gptvq: error: --chat: this model's tokenizer has no chat "
                                                                     "template; leave --chat away\n")
    tokenizer = AutoTokenizer.from_pretrained(my_model)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert tokenizer.decode(cli.encode(tokenizer, "hi", True)[0]) == "[hi]>"
    with pytest.raises(ConfigError, match="prompt is empty"):
        cli.encode(tokenizer, "", False)


@pytest.mark.parametrize("words, says", [
    (("quantize", "MODEL", "OUT", "--calibration", "absent.txt"), "absent.txt"),
    (("quantize", "MODEL", "OUT", "--calibration", "not there.txt"), "not there.txt"),
    (("quantize", "MODEL", "OUT", "--calibration", "TEXT", "--sequence-length", 100_000), "shorter than one window"),
    (("quantize", "MODEL", "OUT", "--calibration", "TEXT", "--rule", "*.absent=keep",
      "--sequence-length", 64), "matches no layer"),
    (("quantize", "NONE", "OUT", "--calibration", "TEXT"), "no-model"),
    (("eval", "MODEL", "--text", "absent.txt"), "absent.txt"),
    (("eval", "NONE", "--text", "TEXT"), "no-model"),
    (("eval", "MODEL", "--text", "TEXT", "--window", 100_000), "shorter than one window"),
    (("eval", "MODEL", "--text", "TEXT", "--max-windows", 1, "--json", "/absent/x"), "/absent/x"),
    (("generate", "MODEL", "a", "--temperature", -1), "--temperature"),
    (("generate", "MODEL", "a", "--temperature", "nan"), "--temperature: got nan"),
    (("generate", "MODEL", "a", "--temperature", 1e-40), "--temperature: got 1e-40"),
    (("generate", "MODEL", "a", "--seed", 2 ** 64), "--seed"),
    (("generate", "MODEL", "a", "--device", "meta"), "no META device"),
    (("inspect", "MODEL"), "got a model that is not packed, need a folder written by `gptvq quantize`"),
    (("inspect", "NONE"), "no such folder"),
])
def test_errors_are_one_line_and_1(words, says, my_model, tmp_path, capsys):
    names = {"MODEL": my_model, "OUT": tmp_path / "out", "TEXT": my_model.parent / "test.txt", "NONE": tmp_path / "no-model"}
    code, _, err = run(capsys, *(names.get(w, w) for w in words))
    assert code == 1 and err.startswith("gptvq: error: ") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("words, says", [
    (("--text", "x", "--limit", 3), "--limit: of no use without --tasks"), (("--text", "x", "--task-folder", "d"), "--task-folder"),
    (("--tasks", "piqa", "--window", 8), "--window: of no use without --text")])
def test_options_of_eval_that_would_be_ignored(words, says, my_model, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "eval", my_model, *words)
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_results_have_a_place_before_any_work(my_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gptvq.hf.open_model", None)
    monkeypatch.setattr("gptvq.kernel_speed.measure", None)
    for words in (("eval", my_model, "--text", "a text"), ("bench",), ("verify", my_model)):
        code, _, err = run(capsys, *words, "--json", tmp_path / "absent" / "a.json")
        assert code == 1 and "absent/a.json: cannot be written" in err


def test_inspect_writes_both_files(packed, tmp_path, capsys):
    code, out, _ = run(capsys, "inspect", packed, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    assert code == 0 and "report: " in out and json.loads((tmp_path / "a.json").read_text())["layers"] and (tmp_path / "a.html").exists()
    code, out, err = run(capsys, "inspect", packed, "--json", "-", "--html", tmp_path / "a.html")
    assert json.loads(out)["layers"] and "report: " in err


def test_inspect_refuses_an_unfinished_folder(packed, tmp_path, capsys):
    (tmp_path / "report.json").write_bytes((packed / "report.json").read_bytes())
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 1 and "never finished" in err


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_leaves_nothing_that_looks_complete(my_model, tmp_path):
    words = [str(w) for w in small(my_model, tmp_path / "o", "--samples", "64")]
    child = subprocess.Popen([sys.executable, "-m", "gptvq.cli", *words], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # a shell's & ignores it
    try:
        for line in child.stdout:
            if " bpv " in line:
                break
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, err
    assert "gptvq: interrupted" in err and "Traceback" not in err
    assert "the same command goes on behind" in err if (tmp_path / "o").exists() else "nothing half-written" in err
    assert not (tmp_path / "o" / "config.json").exists()


def test_exit_code_of_the_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "gptvq.cli", "inspect", tmp_path], env=ENV, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("gptvq: error: ") and "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("line, code, says", [
    ("doctor > /dev/full", 1, "gptvq: error: the output cannot be written (No space left on device)"), ("doctor >&-", 0, ""),
    ("chat no-model <&- 2>&1", 1, "")])
def test_standard_streams_that_are_full_or_closed(line, code, says):
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -m gptvq.cli {line}'], env=ENV, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(says) and "Traceback" not in done.stderr + done.stdout, done
    assert says or not done.stderr


def test_what_the_system_refuses_is_one_line(packed, capsys, monkeypatch):
    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sys.modules["gptvq.verify"], "own_report", refuse)       # gptvq.verify is the function
    code, _, err = run(capsys, "inspect", packed)
    assert code == 1 and err.count("\n") == 1 and f"{packed}: cannot be read or written (Permission denied)" in err


def test_output_whose_encoding_lacks_a_character(packed, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("gptvq.doctor.diagnose", lambda: {"caf\xe9": "\u2192"})
    assert cli.main(["doctor"]) == 0 and out.buffer.getvalue() == b"caf?  ?\n"
