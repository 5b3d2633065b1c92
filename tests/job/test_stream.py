"""Models from the disk, a block at a time: the same bytes as from memory, in memory that does not grow with the model."""
import dataclasses
import json

import pytest
import torch
import transformers
from job.forks import Forks
from job.tiny_models import ARCHITECTURES, SMALL, build, logits, preset
from safetensors.torch import load_file, save_file

import gptvq
from gptvq import ConfigError, NumericalError, stream
from gptvq.hf import open_dense
from gptvq.parts import open_skeleton, read_block, streamable
from gptvq.ranks import Samples
from gptvq.storage import TensorList

FILES = ("model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json")


@pytest.fixture
def dense(tmp_path):
    build().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_are_what_the_whole_is_made_of(name, tmp_path):
    build(name, torch.bfloat16).save_pretrained(tmp_path)
    whole = open_dense(tmp_path)[0]
    model, list_name, blocks = open_skeleton(streamable(tmp_path), "auto")
    found = {name: tensor for name, tensor in [*model.state_dict().items(), *model.named_buffers()] if not tensor.is_meta}
    assert not any(name.startswith(list_name + ".") for name in found)
    for index in range(len(blocks)):
        block = read_block(tmp_path, "auto", f"{list_name}.{index}")
        assert not block.training
        found |= {f"{list_name}.{index}.{name}": tensor for name, tensor in [*block.state_dict().items(), *block.named_buffers()]}
    want = dict([*whole.state_dict().items(), *whole.named_buffers()])
    assert set(found) == set(want)
    assert all(found[name].dtype == want[name].dtype and torch.equal(found[name], want[name]) for name in want)
    assert model.config.to_dict() == whole.config.to_dict()
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_gives_the_bytes_of_the_module(name, tmp_path, ids):
    build(name).save_pretrained(tmp_path / "dense")
    streamed = gptvq.quantize(tmp_path / "dense", tmp_path / "streamed", preset(), calibration=ids)
    module = gptvq.quantize(build(name), tmp_path / "module", preset(), calibration=ids)
    memory = gptvq.quantize(tmp_path / "dense", None, preset(), calibration=ids)
    gptvq.quantize(tmp_path / "dense", tmp_path / "never", preset(), calibration=ids, resume="never")
    for file in FILES:
        a, b, c = ((tmp_path / out / file).read_bytes() for out in ("streamed", "module", "never"))
        assert a == b == c, file
    for layer, other in zip(streamed.layers, module.layers):
        layer.seconds = other.seconds
        assert layer == other
    assert (streamed.dense_bytes, streamed.other_bytes) == (module.dense_bytes, module.other_bytes)
    want = logits(module.model, ids[:2])
    assert torch.equal(logits(streamed.model, ids[:2]), want) and torch.equal(logits(memory.model, ids[:2]), want)


@pytest.mark.parametrize("prefix, settings", [
    ("FalconMamba", dict(hidden_size=64, num_hidden_layers=2, vocab_size=256, state_size=8, initializer_range=0.1)),
])
def test_code_of_their_own_gives_the_bytes_of_the_module(prefix, settings, tmp_path, ids):
    """FalconMamba computes in another way where its configuration says that it is quantized."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{prefix}Config")(**settings)).eval()
    model.save_pretrained(tmp_path / "dense")
    streamed = gptvq.quantize(tmp_path / "dense", tmp_path / "streamed", preset(), calibration=ids)
    module = gptvq.quantize(model, tmp_path / "module", preset(), calibration=ids)
    assert streamed.warnings == module.warnings
    for file in FILES:
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "module" / file).read_bytes(), file
    assert torch.equal(logits(gptvq.load(tmp_path / "streamed", device="cpu"), ids), logits(streamed.model, ids))


def test_code_that_reaches_into_blocks_is_read_as_a_whole(tmp_path, ids):
    """FalconH1 fills tables of its blocks once its weights are read, which takes all blocks."""
    settings = {**SMALL, "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.FalconH1Config(**settings)).eval()
    model.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="in memory as a whole"):
        whole = gptvq.quantize(tmp_path / "dense", tmp_path / "whole", preset(), calibration=ids)
    gptvq.quantize(model, tmp_path / "module", preset(), calibration=ids)
    for file in FILES:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "module" / file).read_bytes(), file
    assert torch.equal(logits(gptvq.load(tmp_path / "whole", device="cpu"), ids), logits(whole.model, ids))
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot load it"):
        gptvq.quantize(tmp_path / "dense", None, preset(), calibration=ids)


def test_one_block_is_in_memory_at_a_time(dense, tmp_path, ids, monkeypatch):
    load, most = stream.BlockStream.load, []

    def counting(self, block):
        found = load(self, block)
        most.append(sum(any(not t.is_meta for t in other.module.state_dict().values()) for other in self.blocks))
        return found

    monkeypatch.setattr(stream.BlockStream, "load", counting)
    report = gptvq.quantize(dense, tmp_path / "out", preset(), calibration=ids)
    assert set(most) == {1} and len(most) == 4          # the first look, then the work
    assert report._model is None and report.model.dtype == torch.float32


@pytest.mark.parametrize("compensate", [1.0, 0])
def test_hidden_states_on_the_disk(dense, tmp_path, ids, monkeypatch, compensate):
    """However little memory there is: the same bytes, and nothing left lying about."""
    recipe = gptvq.Recipe(em_iterations=5, passes=1, sweeps=1, cg_iterations=3, compensate=compensate)
    config = gptvq.VQConfig.preset("2d-2.25", recipe=recipe)
    gptvq.quantize(dense, tmp_path / "memory", config, calibration=ids)
    made = []
    monkeypatch.setattr(stream, "available_memory", lambda: 10_000)
    monkeypatch.setattr(stream, "TensorList", lambda *args, **named: made.append(TensorList(*args, **named)) or made[-1])
    monkeypatch.setattr(stream.TensorList, "open", TensorList.open, raising=False)
    gptvq.quantize(dense, tmp_path / "disk", config, calibration=ids)
    assert len(made) > 2 and all(len(states) == len(ids) for states in made)
    for file in FILES:
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes()
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {*FILES, "report.json", "times.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lists_of_tensors_in_files(tmp_path, dtype):
    states = [torch.randn(1, 5, 7).to(dtype) for _ in range(3)]
    for scratch in (False, True):
        found = TensorList(tmp_path / f"{scratch}.safetensors", 3, scratch)
        for index, state in enumerate(states):
            found.append(state)
            assert torch.equal(found[index], state) and len(found) == index + 1
        assert all(torch.equal(a, b) for a, b in zip(found, states))
        if not scratch:
            found.file.seal()
            assert all(torch.equal(a, b) for a, b in zip(found, states))
            assert all(torch.equal(a, b) for a, b in zip(TensorList.open(found.path), states))
            assert all(torch.equal(load_file(found.path)[str(i)], state) for i, state in enumerate(states))
        with pytest.raises(IndexError):
            found[3]
    assert [p.name for p in tmp_path.iterdir()] == ["False.safetensors"]


def test_damaged_models_are_refused_before_any_work(dense, tmp_path, ids):
    def refused(match, error=ConfigError, config=preset()):
        with pytest.raises(error, match=match):
            gptvq.quantize(dense, tmp_path / "out", config, calibration=ids)
        assert not (tmp_path / "out").exists()

    tensors = load_file(dense / "model.safetensors")
    broken = {**tensors, "model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"].clone()}
    broken["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(broken, dense / "model.safetensors", metadata={"format": "pt"})
    refused("model.layers.1.mlp.up_proj: the weight holds 1 non-finite", NumericalError)
    del broken["model.layers.1.mlp.up_proj.weight"]
    save_file(broken, dense / "model.safetensors", metadata={"format": "pt"})
    whole = dataclasses.replace(preset(), recipe=gptvq.Recipe(token_weights="loss"))
    for config in (preset(), whole):                        # read block by block, and as a whole
        refused("'model.layers.1.mlp.up_proj.weight' is in none of its files", config=config)
    (dense / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:-9])
    refused("cannot load it")


def test_what_is_not_streamed_is_read_as_a_whole(dense, tmp_path, ids):
    assert streamable(dense) == dense
    settings = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptvq"}}))
    assert streamable(dense) is None and streamable(tmp_path / "nowhere") is None and streamable("a/b/c") is None
    (dense / "config.json").write_text(json.dumps(settings))
    torch_only = tmp_path / "torch"
    torch_only.mkdir()
    (torch_only / "config.json").write_text(json.dumps(settings))
    assert streamable(torch_only) is None


def test_hidden_states_live_on_a_gpu_that_has_the_room(monkeypatch):
    gpu, samples, state = torch.device("cuda"), Samples(10), torch.ones(1, 8, 16)
    nbytes = 4 * state.numel()
    monkeypatch.setattr(stream.ops, "free_bytes", lambda device: None if device.type == "cpu" else (free, 0))
    for free, home in ((175 * nbytes, "cpu"), (175 * nbytes + 1, "cuda")):
        assert stream.Activations(None, samples, nbytes, gpu).home.type == home
        assert stream.Activations(None, samples, nbytes, torch.device("cpu")).home.type == "cpu"
    found = stream.Activations(None, samples, nbytes, torch.device("cpu"))
    assert found.at_home([state])[0] is state


@pytest.mark.gpu
def test_the_same_bytes_wherever_they_live(dense, ids, tmp_path, monkeypatch):
    found = {}
    for resident in (True, False):
        monkeypatch.setattr(stream, "states_on_device", lambda *args: resident)
        plan = gptvq.plan(dense, preset(), calibration=ids, device="cuda")
        gptvq.quantize(dense, tmp_path / str(resident), preset(), calibration=ids, device="cuda")
        found[resident] = (tmp_path / str(resident) / "model.safetensors").read_bytes(), plan.peak_gpu
    assert found[True][0] == found[False][0] and found[True][1] >= found[False][1]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """{blocks: folder} of models with blocks of 4 MB."""
    found = {}
    for blocks in (10, 40):
        found[blocks] = tmp_path_factory.mktemp("deep") / str(blocks)
        config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": blocks})
        transformers.LlamaForCausalLM(config).save_pretrained(found[blocks])
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(deep, tmp_path):
    """30 blocks more are 126 MB more; what is quantized of them is a little, so that the test is quick."""
    forks = Forks()
    try:
        rules = {"rules": [["*.mlp.*", None], ["*.q_proj", None], ["*.o_proj", None]]}
        peaks = {}
        for blocks, resume in ((10, "auto"), (40, "auto"), (40, "never")):
            result = forks.run(model=deep[blocks], out=tmp_path / f"{blocks}-{resume}", config=rules, arguments={"resume": resume})
            assert result["error"] is None
            peaks[blocks, resume] = result["peak"] / 1e6
    finally:
        forks.close()
    assert peaks[40, "auto"] - peaks[10, "auto"] < 25, peaks
    assert peaks[40, "never"] - peaks[10, "auto"] > 90, peaks       # without the journal all blocks wait in memory: the test can tell
