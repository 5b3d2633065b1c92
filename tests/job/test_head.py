"""The output head packed too, and the embedding that is tied to it: files, memory, every way in and out."""
import dataclasses
import json
import shutil
import sys

import pytest
import torch
from job.test_resume import files
from job.tiny_models import QUICK, build, logits, preset
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import gptvq
from gptvq import ConfigError, FormatError, NumericalError, QuantSpec, VQConfig, VQLinear, cli
from gptvq.embedding import TiedEmbedding, VQEmbedding
from gptvq.export import export_dense
from gptvq.head import solve_parts
from gptvq.hessian import Hessian
from gptvq.report import Progress
from gptvq.solver import solve
from gptvq.tune import tune

HEAD = "2d-4.125"
TIED = ("llama-tied", "gpt2", "gemma")


def with_head(**changes):
    return preset("2d-2.25", head=HEAD, **changes)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, ids):
    """{model: (dense folder, packed folder, report)}, made when first asked for."""
    made = {}

    def of(name):
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(place / "dense")
            report = gptvq.quantize(place / "dense", place / "out", with_head(), calibration=ids)
            made[name] = place / "dense", place / "out", report
        return made[name]

    return of


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["llama", "llama-bias", "mistral", "mixtral", *TIED])
def test_every_way_gives_one_model(name, packed, ids, tmp_path):
    dense, out, report = packed(name)
    stored, tied = load_file(out / "model.safetensors"), name in TIED
    table = next(key for key, _ in build(name).named_parameters() if key.endswith(("embed_tokens.weight", "wte.weight")))
    name_of_table = table.removesuffix(".weight")
    assert "lm_head.idx" in stored and "lm_head.weight" not in stored and table not in stored
    assert gptvq.verify(out).layers == len(report.layers) and report.layers[0 if tied else -1].name == "lm_head"
    assert (report.layers[0].name == name_of_table) == (f"{name_of_table}.idx" in stored) == (not tied)
    want = logits(AutoModelForCausalLM.from_pretrained(out), ids)
    loaded = gptvq.load(out, "cpu")
    assert isinstance(loaded.get_output_embeddings(), VQLinear) and isinstance(loaded.get_input_embeddings(), TiedEmbedding if tied else VQEmbedding)
    assert torch.equal(logits(loaded, ids), want)
    assert torch.equal(logits(gptvq.quantize(build(name), None, with_head(), calibration=ids).model, ids), want)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(gptvq.load(tmp_path / "again", "cpu"), ids), want)
    export_dense(out, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert (logits(plain, ids) - want).abs().max() < 2e-3       # activations enter the kernels in 16 bits
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_head_is_solved_for_what_it_sees(name, packed, ids):
    """Its error is that of the formula on the inputs it has behind the packed blocks, or, as an embedding too, behind the dense ones."""
    _, out, report = packed(name)
    model, dense, seen = gptvq.load(out, "cpu"), build(name).get_output_embeddings().weight.detach(), []
    seeing = build(name) if name in TIED else model
    seeing.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    logits(seeing, ids)
    H = torch.cat(seen).T @ torch.cat(seen)
    error, record = model.get_output_embeddings().dequantize() - dense, next(r for r in report.layers if r.name == "lm_head")
    assert ((error @ H) * error).sum() / ((dense @ H) * dense).sum() == pytest.approx(record.error, rel=1e-3)
    assert 0 < record.error < 0.01


def test_memory_is_that_of_the_packed_tensors(packed):
    _, out, report = packed("llama-tied")
    model = gptvq.load(out, "cpu")
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert held == report.packed_bytes + report.other_bytes
    assert not any(p.shape == (256, 64) for p in model.parameters())
    head = report.layers[0].spec
    assert report.bits_per_value == pytest.approx(8 * report.packed_bytes / sum(r.spec.rows * r.spec.cols for r in report.layers))
    assert (head.rows, head.cols) == (256, 64) and report.dense_bytes == 4 * sum(r.spec.rows * r.spec.cols for r in report.layers)


def test_it_generates_as_dense_weights_do(packed, tmp_path):
    _, out, _ = packed("llama-tied")
    export_dense(out, tmp_path / "plain")
    prompt = torch.arange(10)[None]
    one, other = (model.generate(prompt, max_new_tokens=12, do_sample=False)
                  for model in (gptvq.load(out, "cpu"), AutoModelForCausalLM.from_pretrained(tmp_path / "plain")))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_a_plan_knows_its_size(name, packed, ids):
    dense, _, report = packed(name)
    for source in (dense, build(name)):
        found = gptvq.plan(source, with_head(), calibration=ids)
        assert (found.packed_bytes, found.dense_bytes, found.other_bytes) == (report.packed_bytes, report.dense_bytes, report.other_bytes)
        assert found.specs == {record.name: record.spec for record in report.layers} and set(found.seconds) == set(report.stages)


def test_a_target_size_counts_it(packed, ids):
    dense, _, report = packed("llama-tied")
    size = report.packed_bytes + report.other_bytes
    found = gptvq.plan(dense, with_head(), calibration=ids, target_bytes=size + 2000, presets=("2d-2.25", "2d-3.125"))
    assert size < found.disk <= size + 2000 and found.config.head == HEAD


@pytest.mark.parametrize("request_", [{"ranks": 3}, {"config": {"head": "2d-2.25-s64"}, "ranks": 2, "least_part": 1}], ids=str)
def test_processes_share_it(forks, folder, tmp_path, request_):
    request = {"model": folder, "config": {"head": HEAD}, "samples": 5} | request_
    for out, changes in (("one", {"ranks": 1}), ("many", {})):
        result = forks.run(**request | changes, out=tmp_path / out)
        assert all(r["error"] is None and r["signal"] == 0 for r in (result, *result.get("others", ()))), result
    assert files(tmp_path / "many") == files(tmp_path / "one")


class Stops(Progress):
    """Interrupts before `at` is solved."""

    def __init__(self, at):
        self.at = at

    def stage(self, text):
        if text == f"solving {self.at}":
            raise KeyboardInterrupt


@pytest.mark.parametrize("source", ["folder", "module"])
@pytest.mark.parametrize("name, at, left", [("llama-tied", "model.layers.1.mlp.up_proj", 7), ("llama", "model.layers.1.mlp.up_proj", 7),
                                            ("llama", "lm_head", 0)])
def test_an_interrupted_run_goes_on(name, at, left, source, packed, ids, tmp_path, monkeypatch):
    """With the head solved again, or the embedding, and no layer of a block that was done."""
    dense, out, _ = packed(name)
    solved, quantizing = [], sys.modules["gptvq.quantize"]
    monkeypatch.setattr(quantizing, "solve", lambda *args, solve=quantizing.solve: (solved.append(args[4]), solve(*args))[1])
    with pytest.raises(KeyboardInterrupt):
        gptvq.quantize(dense if source == "folder" else build(name), tmp_path / "out", with_head(), calibration=ids, progress=Stops(at))
    solved.clear()
    gptvq.quantize(dense if source == "folder" else build(name), tmp_path / "out", with_head(), calibration=ids)
    mine, other = files(tmp_path / "out"), files(out)
    assert mine == other if source == "folder" else mine["model.safetensors"] == other["model.safetensors"]
    assert len(solved) == left
    with pytest.raises(gptvq.ResumeMismatch, match="head"):
        gptvq.quantize(dense, tmp_path / "out", dataclasses.replace(with_head(), head="2d-3.125"), calibration=ids)


def test_an_embedding_done_again_is_a_run_from_the_start(packed, ids, tmp_path):
    dense, out, _ = packed("llama")
    gptvq.quantize(dense, tmp_path / "out", with_head(), calibration=ids[:2])
    report = gptvq.quantize(dense, tmp_path / "out", with_head(), calibration=ids, redo="embed_tokens")
    assert report.redone["from"] == "model.layers.0" and files(tmp_path / "out")["model.safetensors"] == files(out)["model.safetensors"]


@pytest.mark.parametrize("name, pattern, first", [("llama", "lm_head", "the head"), ("llama", "layers.1.*", "model.layers.1"),
                                                  ("llama-tied", "layers.1.*", "model.layers.1"), ("llama-tied", "lm_head", "model.layers.0")])
def test_it_is_done_again_with_what_is_behind_it(name, pattern, first, packed, ids, tmp_path):
    """But not what the kept blocks were made for: the embedding, or the head that is one too."""
    dense, _, _ = packed(name)
    gptvq.quantize(dense, tmp_path / "out", with_head(), calibration=ids[:2])
    before = load_file(tmp_path / "out/model.safetensors")
    report = gptvq.quantize(dense, tmp_path / "out", with_head(), calibration=ids, redo=pattern)
    after = load_file(tmp_path / "out/model.safetensors")
    changed = {key.rpartition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert report.redone["from"] == first and ("lm_head" in changed) == (name == "llama" or first == "model.layers.0")
    assert report.layers[0].name == ("lm_head" if name in TIED else "model.embed_tokens") and len(report.layers) == 15 + (name not in TIED)
    for place in (0, 1):
        assert any(name.startswith(f"model.layers.{place}.") for name in changed) == (first <= f"model.layers.{place}")
    assert gptvq.verify(tmp_path / "out")


@pytest.mark.parametrize("name, front", [("llama", "model.embed_tokens"), ("llama-tied", "lm_head")])
def test_blocks_are_not_kept_for_another_embedding(name, front, packed, ids, tmp_path):
    dense, out, _ = packed(name)
    shutil.copytree(out, tmp_path / "out")
    for config, now in ((preset("2d-2.25", head="2d-3.125"), "{.*}"), (preset("2d-2.25"), "dense")):
        with pytest.raises(gptvq.ResumeMismatch, match=rf"{front}: its format was .*, is {now}; .* or redo 'model.layers.0.\*' as well"):
            gptvq.quantize(dense, tmp_path / "out", config, calibration=ids, redo="layers.1.*")
    gptvq.quantize(dense, tmp_path / "out", preset("2d-2.25"), calibration=ids, resume="fresh")
    with pytest.raises(gptvq.ResumeMismatch, match=f"{front}: its format was dense"):
        gptvq.quantize(dense, tmp_path / "out", with_head(), calibration=ids, redo="layers.1.*")
    gptvq.quantize(dense, tmp_path / "out", with_head(), calibration=ids, redo=("layers.1.*", "layers.0.*"))
    assert files(tmp_path / "out")["model.safetensors"] == files(out)["model.safetensors"]


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_tuning_leaves_what_embeddings_are_looked_up_in(name, packed, ids):
    dense, out, _ = packed(name)
    model, teacher = gptvq.load(out, "cpu"), AutoModelForCausalLM.from_pretrained(dense)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = tune(model, teacher, ids.repeat(4, 1), batch=4, rate=1e-2)
    after = model.state_dict()
    assert losses[-1] < losses[0] and (name == "llama" or model.get_input_embeddings().head is model.get_output_embeddings())
    changed = {key.rpartition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert "model.embed_tokens" not in changed and ("lm_head" in changed) == (name == "llama")


def test_the_command_line(packed, ids, tmp_path, capsys):
    dense, out, _ = packed("llama-tied")
    (tmp_path / "ids.txt").write_text("text")
    assert cli.main(["plan", str(dense), "--head", HEAD, "--samples", "2", "--json", str(tmp_path / "plan.json")]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["config"]["head"] == HEAD
    assert cli.main(["inspect", str(out)]) == 0 and "lm_head" in capsys.readouterr().out
    assert cli.main(["quantize", str(dense), str(tmp_path / "no"), "--head", "4d-9", "--calibration", str(tmp_path / "ids.txt")]) == 1
    assert "unknown preset '4d-9'" in capsys.readouterr().err


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids))


@pytest.mark.parametrize("change, error, says", [
    (lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)), ConfigError, "has a Sequential as its output head, need an nn.Linear"),
    (lambda m: setattr(m, "get_output_embeddings", lambda: None), ConfigError, "has no output head"),
    (lambda m: m.lm_head.weight.data[3].fill_(torch.inf), NumericalError, "model.embed_tokens: the weight holds 64 non-finite"),
    (lambda m: setattr(m.get_input_embeddings(), "__class__", Normed), ConfigError, "model.embed_tokens, whose Normed does more"),
], ids=["other head", "none", "not finite", "other embedding"])
def test_what_cannot_be_packed_is_named_before_any_work(change, error, says, ids):
    model = build("llama-tied")
    change(model)
    with pytest.raises(error, match=says):
        gptvq.quantize(model, None, with_head(), calibration=ids)
    with pytest.raises(error, match=says):
        gptvq.plan(model, with_head(), calibration=ids)


def test_a_base_model_without_its_head_is_refused(packed):
    with pytest.raises(ConfigError, match="LlamaModel has no lm_head, whose packed weight model.embed_tokens shares"):
        AutoModel.from_pretrained(packed("llama-tied")[1])


@pytest.mark.parametrize("tied, says", [({"model.norms": "lm_head"}, "norms"), ({"model.rotary_emb": "lm_head"}, "need an nn.Embedding"),
                                        ({"model.embed_tokens": "model.layers.0.mlp.up_proj"}, "an nn.Embedding of 96 x 64")])
def test_what_else_is_tied_is_refused(tied, says, packed, tmp_path):
    shutil.copytree(packed("llama-tied")[1], tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["tied"] = tied
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"tied: .*{says}"):
        gptvq.load(tmp_path / "out")


def test_settings(ids):
    assert "head" not in VQConfig.preset("2d-2.25").to_dict()
    config = VQConfig.preset("2d-2.25", head=HEAD)
    assert VQConfig.from_dict(config.to_dict()) == config
    report = gptvq.quantize(build(), None, VQConfig.preset("2d-2.25", head="1d-3.125", recipe=dataclasses.replace(QUICK, compensate=0)),
                            calibration=ids)
    assert report.layers[-1].spec.label == "1d K8"


@pytest.mark.parametrize("label", ["2d-2.25", "2d-3.125-s64", "4d-2.125-s64", "4d-3.125-s64", "1d-2.125"])
@pytest.mark.parametrize("rows", [1000, 1024])
def test_in_parts_it_is_as_good_and_its_scales_are_those_of_the_whole(label, rows):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(rows, 96, generator=generator), torch.randn(500, 96, generator=generator)
    weight[:, 64:] *= torch.rand(rows, 1, generator=generator)
    weight[300:400, :64] = 0                            # a part with a block of zeros that the others have not
    weight[500] *= 1e-9                                 # and one with a row whose scales would be below all others
    hessian, spec = Hessian.from_matrix(2 / 500 * x.T @ x), VQConfig.preset(label, group_size=4096).spec(rows, 96)
    arguments = weight, hessian, spec, QUICK, "lm_head"
    (one, whole), (many, parts) = (solve_parts(*arguments, most, torch.device("cpu")) for most in (rows * 96, 96 * 100))
    assert many.spec == spec and parts.spec == spec and parts.sha256 != whole.sha256
    assert parts.error == pytest.approx(whole.error, rel=0.05) and parts.stages.keys() == whole.stages.keys()
    if spec.scale_block:
        assert torch.equal(one.buffers["sz"], many.buffers["sz"]) and torch.equal(one.buffers["sc"], many.buffers["sc"])
    error = many.dequantize() - weight
    H = hessian.matrix()
    assert float(((error @ H) * error).sum() / ((weight @ H) * weight).sum()) == pytest.approx(parts.error, rel=1e-3)


def test_what_ties_all_rows_together_is_solved_at_once():
    weight, hessian = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), Hessian.from_matrix(torch.eye(64))
    for spec, recipe in ((QuantSpec(64, 64, 1, 3, 16, 64, svd_rank=2), QUICK), (QuantSpec(64, 64, 2, 2, 16, 64, 32), gptvq.Recipe.paper())):
        want = solve(weight, hessian, spec, recipe)[1].sha256
        assert solve_parts(weight, hessian, spec, recipe, "lm_head", 16 * 64, torch.device("cpu"))[1].sha256 == want
