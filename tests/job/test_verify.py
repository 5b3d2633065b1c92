"""gptvq.verify on sound checkpoints and on changes that only hashes show; what reading a hostile file costs; no code from files."""
import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
import transformers
from job.tiny_models import SMALL, build, preset

import gptvq
from bench.damage import join, split
from gptvq import ConfigError, FormatError, cli, tensorfile


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_sound_checkpoint(sound, capsys):
    found = gptvq.verify(sound)
    assert (found.layers, found.files, found.hashed) == (3, 3, ("files", "layers"))
    assert found.nbytes == sum(file.stat().st_size for file in sound.glob("*.safetensors"))
    assert gptvq.verify(sound, hashes=False).hashed == ()
    assert cli.main(["verify", str(sound)]) == 0
    assert "3 packed layers" in (out := capsys.readouterr().out) and "hashes of files and layers are right" in out
    assert cli.main(["verify", str(sound), "--no-hashes", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"layers": 3, "tensors": found.tensors, "files": 3, "nbytes": found.nbytes, "hashed": []}


def test_folders_without_a_checkpoint(tmp_path, capsys):
    with pytest.raises(ConfigError, match="no such folder"):
        gptvq.verify(tmp_path / "absent")
    with pytest.raises(FormatError, match=r"config\.json: cannot be read"):
        gptvq.verify(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FormatError, match="not a gptvq checkpoint"):
        gptvq.verify(tmp_path)
    assert cli.main(["verify", str(tmp_path)]) == 1 and capsys.readouterr().err.startswith("gptvq: error: ")


def test_hashes_show_what_structure_cannot(copy, capsys):
    """Another code is as good a code, and another embedding as good an embedding."""
    for tensor, says in (("model.layers.0.mlp.up_proj.idx", "model.layers.0.mlp.up_proj"), ("model.embed_tokens.weight", "sha256 is")):
        file = next(f for f in copy.glob("*.safetensors") if tensor in split(f.read_bytes())[0])
        before = file.read_bytes()
        flip(file, 8 + int.from_bytes(before[:8], "little") + split(before)[0][tensor]["data_offsets"][0])
        gptvq.verify(copy, hashes=False)
        with pytest.raises(FormatError, match=says) as caught:
            gptvq.verify(copy)
        assert str(file) in str(caught.value)
        assert cli.main(["verify", str(copy)]) == 1 and str(file) in capsys.readouterr().err
        file.write_bytes(before)
    gptvq.verify(copy)


def test_the_report_must_be_of_this_checkpoint(copy):
    values = json.loads((copy / "report.json").read_text())
    for change, says in ((lambda v: v["layers"].pop(), "no record"), (lambda v: v["layers"][0]["spec"].update(group_rows=8), "do not fit"),
                         (lambda v: v["layers"].append({**v["layers"][0], "name": "stranger"}), "'stranger'"),
                         (lambda v: v["layers"][0].update(sha256="0" * 64), "sha256"),
                         (lambda v: v["layers"][0].update(error=None), "error"), (lambda v: v.update(layers={"a": 1}), "not a report"),
                         (lambda v: v["config"].update(group_size=10**400), "report")):
        changed = json.loads(json.dumps(values))
        change(changed)
        (copy / "report.json").write_text(json.dumps(changed))
        with pytest.raises(FormatError, match=says):
            gptvq.verify(copy)
    (copy / "report.json").unlink()
    assert gptvq.verify(copy).hashed == ("files",)


def test_inspect_checks_the_structure(copy, capsys):
    assert cli.main(["inspect", str(copy)]) == 0 and "up_proj" in capsys.readouterr().out
    next(copy.glob("*.safetensors")).unlink()
    assert cli.main(["inspect", str(copy)]) == 1 and ".safetensors: cannot be read" in capsys.readouterr().err


def test_inspect_refuses_the_report_of_another_checkpoint(copy, capsys):
    path = copy / "report.json"
    path.write_text(path.read_text().replace("model.layers.0.mlp.up_proj", "model.layers.9.mlp.up_proj"))
    assert cli.main(["inspect", str(copy)]) == 1 and "the files do not fit together" in capsys.readouterr().err


def test_names_are_no_markup(copy, capsys):
    """A layer may be called whatever it likes: it is printed, not interpreted."""
    for path in copy.iterdir():
        path.write_bytes(path.read_bytes().replace(b"0.mlp.up_proj", b"0.mlp.[/bold]"))
    assert cli.main(["inspect", str(copy)]) == 0 and "[/bold]" in capsys.readouterr().out


def peak(file):
    """(bytes that reading the header took at most, what it raised)."""
    tracemalloc.start()
    try:
        tensorfile.read_header(file)
        raised = None
    except FormatError as error:
        raised = str(error)
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return most, raised


MANY = b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(30_000)) + b"}"


@pytest.mark.parametrize("header", [b'{"a":' + b"[" * 10**6, b'{"a":[' + b"[]," * 300_000 + b"0]}", b'{"a":"' + b"x" * 2_000_000 + b'"}',
                                    MANY],
                         ids=["nested", "lists", "string", "tensors"])
def test_memory_of_a_hostile_header(header, tmp_path):
    """It stays below a fixed amount in a small file, and below twice the size of a large one, of which the header may be a fiftieth."""
    file = tmp_path / "model.safetensors"
    for size in (0, 150_000_000):
        file.write_bytes(join(header, b""))
        with open(file, "r+b") as handle:
            handle.truncate(max(file.stat().st_size, size))     # the rest is a hole and takes no room
        most, raised = peak(file)
        assert most < 60_000_000 and (raised or b"dtype" in header and not size)


@pytest.mark.parametrize("claim", [2**31, 2**40, 2**63, 2**64 - 1])
def test_a_claimed_size_is_not_believed(claim, tmp_path):
    file = tmp_path / "model.safetensors"
    for data in (claim.to_bytes(8, "little") + b"{}", join({"a": {"dtype": "U8", "shape": [claim], "data_offsets": [0, claim]}}, b"1234")):
        file.write_bytes(data)
        most, raised = peak(file)
        assert most < 1_000_000 and "model.safetensors" in raised


def test_transformers_by_itself_meets_the_same_checks(copy, tmp_path):
    """No index leads out of the folder, and experts that no file holds are not built one by one."""
    from transformers import AutoModelForCausalLM

    index = json.loads((copy / "model.safetensors.index.json").read_text())
    first = min(index["weight_map"].values())
    shutil.move(copy / first, tmp_path / first)
    index["weight_map"] = {name: f"../{file}" if file == first else file for name, file in index["weight_map"].items()}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="plain name|names"):
        AutoModelForCausalLM.from_pretrained(copy)
    shutil.copytree(Path(__file__).parents[1] / "golden" / "v1" / "mixtral", tmp_path / "mixtral")
    config = json.loads((tmp_path / "mixtral" / "config.json").read_text())
    (tmp_path / "mixtral" / "config.json").write_text(json.dumps({**config, "num_local_experts": 5000}))
    with pytest.raises(FormatError, match="asks for 5000 experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    with pytest.raises(FormatError, match="num_local_experts: got 5000"):
        gptvq.load(tmp_path / "mixtral", device="cpu")


def test_code_in_a_checkpoint_is_not_run(copy, tmp_path):
    """auto_map names Python files beside the checkpoint: they are left alone, and nobody is asked on the terminal."""
    (copy / "modeling_trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nfrom transformers import LlamaForCausalLM as Trap\n")
    values = json.loads((copy / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "modeling_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    (copy / "config.json").write_text(json.dumps(values))
    assert isinstance(gptvq.load(copy, device="cpu").get_submodule("model.layers.0.mlp.up_proj"), gptvq.VQLinear)
    (copy / "config.json").write_text(json.dumps({**values, "model_type": "trap"}))
    with pytest.raises(FormatError, match="cannot load it"):
        gptvq.load(copy, device="cpu")
    assert not (tmp_path / "sprung").exists()


def test_counts_of_experts_concern_models_that_have_some(tmp_path, ids):
    """A dense Doge speaks of 16384 experts; in a mixture of experts a count beyond all tensors is damage."""
    dense = transformers.AutoModelForCausalLM.from_config(transformers.DogeConfig(**SMALL))
    gptvq.quantize(dense, tmp_path / "dense", preset(), calibration=ids)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["num_experts"] == 16384
    assert gptvq.verify(tmp_path / "dense").layers == 16 and gptvq.load(tmp_path / "dense", device="cpu") is not None
    gptvq.quantize(build("mixtral"), tmp_path / "sparse", preset(), calibration=ids)
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    (tmp_path / "sparse" / "config.json").write_text(json.dumps({**config, "num_local_experts": 10**9}))
    with pytest.raises(FormatError, match="num_local_experts: got 1000000000, the files hold"):
        gptvq.verify(tmp_path / "sparse")


def test_state_dicts_with_values_that_are_none():
    vq = gptvq.VQLinear.from_weight(gptvq.quantize_weight(torch.randn(16, 32), torch.eye(32), "2d-2.25"), name="layer")
    broken = {**vq.state_dict(), "gs": torch.full_like(vq.gs, float("nan"))}
    with pytest.raises(RuntimeError, match="gs: holds 1 values that are not finite"):
        vq.load_state_dict(broken)
    vq.gs.fill_(float("inf"))
    with pytest.raises(FormatError, match="layer.gs: holds 1 values that are not finite"):
        vq.check()


def test_state_dicts_of_the_signed_format_hold_absolute_values():
    vq = gptvq.VQLinear.from_weight(gptvq.quantize_weight(torch.randn(16, 32), torch.eye(32), "4d-3.125"), name="layer")
    vq.check()
    broken = {**vq.state_dict(), "cb": -vq.cb}
    with pytest.raises(RuntimeError, match="cb: holds 1024 values below 1, which a signed format does not have"):
        vq.load_state_dict(broken)
    vq.cb.abs_()[0, 0, 2, 7] = 0
    with pytest.raises(FormatError, match="layer.cb: holds 1 values below 1"):
        vq.check()
