"""large_pages.settle: the same model, its weights side by side in memory of large pages."""
import copy
import gc
import mmap

import pytest
import safetensors.torch
import torch
from packed_cases import random_weight
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gptvq
from gptvq import QuantSpec, VQLinear, large_pages
from gptvq.embedding import VQEmbedding

pytestmark = pytest.mark.skipif(bool(large_pages.why_not()), reason=f"no large pages: {large_pages.why_not()}")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 96)
        self.places = VQEmbedding.of(random_weight(QuantSpec(50, 96, 2, 2, 16, 32), 9), torch.float32)
        self.first = VQLinear.from_weight(random_weight(QuantSpec(64, 96, 2, 2, 16, 32, 32)), torch.randn(64))
        self.second = VQLinear.from_weight(random_weight(QuantSpec(96, 64, 1, 3, 16, 64), 1))
        self.head = nn.Linear(96, 50, bias=False)
        self.tied = nn.Linear(96, 50, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("shared", torch.randn(7))
        self.norm = nn.LayerNorm(96, dtype=torch.bfloat16)
        self.norm.register_buffer("shared", self.shared)
        self.norm.register_buffer("none", None)
        self.norm.register_buffer("empty", torch.empty(0))

    @torch.no_grad()
    def forward(self, ids):
        return self.head(self.second(self.first(self.tokens(ids) + self.places(ids))))


@pytest.fixture
def model():
    return Model().eval()


IDS = torch.tensor([[3, 1, 4, 1, 5]])


def tensors(model):
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def addresses(model):
    return {name: tensor.data_ptr() for name, tensor in tensors(model).items()}


def is_settled(tensor):
    return any(tensor.data_ptr() in there for there in large_pages._settled.values())


def test_the_same_model_in_one_place(model):
    want, before = model(IDS), {name: t.clone() for name, t in tensors(model).items()}
    parameters = dict(model.named_parameters())
    assert large_pages.settle(model) is model
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in tensors(model).items())
    assert all(is_settled(t) == (not name.startswith(("tokens", "places")) and t.numel() > 0) for name, t in tensors(model).items())
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items()) and model.tied.weight is model.head.weight
    assert model.norm.shared is model.shared and torch.equal(model(IDS), want)
    order = [getattr(layer, b).data_ptr() for layer in (model.first, model.second) for b in layer.spec.buffer_shapes()]
    assert order == sorted(order) and order[-1] - order[0] < 100_000 and all(at % 64 == 0 for at in order)
    place = addresses(model)
    large_pages.settle(model)                               # nothing is left to do
    assert addresses(model) == place


def test_changes_afterwards_are_seen(model):
    large_pages.settle(model)
    before = model(IDS)
    model.second.gs.mul_(2)
    torch.testing.assert_close(model(IDS), 2 * before, rtol=1e-3, atol=1e-3)
    model.first.load_state_dict(Model().first.state_dict())
    assert is_settled(model.first.idx) and not torch.allclose(model(IDS), 2 * before)


def test_tensors_keep_their_size_in_files_and_copies(model, tmp_path):
    large_pages.settle(model)
    state = model.first.state_dict()
    torch.save(state, tmp_path / "first.pt")
    assert (tmp_path / "first.pt").stat().st_size < 20_000 and all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
    safetensors.torch.save_file(state, tmp_path / "first.safetensors")          # which refuses tensors that share memory
    twin = copy.deepcopy(model)
    assert not is_settled(twin.first.idx) and torch.equal(twin(IDS), model(IDS))


def test_memory_goes_with_the_last_tensor():
    gc.collect()
    before = len(large_pages._settled)
    model = large_pages.settle(Model())
    kept = model.first.idx
    assert len(large_pages._settled) == before + 1
    del model
    gc.collect()
    assert len(large_pages._settled) == before + 1 and is_settled(kept)
    del kept
    gc.collect()
    assert len(large_pages._settled) == before


def test_large_pages_hold_it():
    """As far as the kernel says: it gives small ones where memory is in pieces."""
    weights = large_pages.settle(nn.Sequential(nn.Linear(2048, 2048, bias=False)))
    address, size = weights[0].weight.data_ptr(), 0
    with open("/proc/self/smaps") as maps:
        for line in maps:
            name, _, rest = line.partition(" ")
            if "-" in name and not name.endswith(":"):
                low, high = (int(part, 16) for part in name.split("-"))
            elif name == "AnonHugePages:" and low <= address < high:
                size = int(rest.split()[0]) * 1024
    if not size:
        pytest.skip("the kernel had no large pages to give")
    assert size % (2 << 20) == 0


def refuse(*args, **kwargs):
    raise OSError("no memory")


@pytest.mark.parametrize("spoil", [
    lambda patch, path: patch.setenv("GPTVQ_LARGE_PAGES", "0"),
    lambda patch, path: patch.setattr(large_pages, "_SYSTEM", path / "missing"),
    lambda patch, path: patch.setattr(large_pages, "_SYSTEM", path),            # which cannot be read
    lambda patch, path: patch.setattr(large_pages, "_SYSTEM", path / "never"),
    lambda patch, path: patch.delattr(mmap, "MADV_HUGEPAGE"),
    lambda patch, path: patch.setattr(large_pages, "available_memory", lambda: 1000),
    lambda patch, path: patch.setattr(mmap, "mmap", refuse),
])
def test_left_where_they_are(model, monkeypatch, tmp_path, spoil):
    (tmp_path / "never").write_text("always madvise [never]\n")
    spoil(monkeypatch, tmp_path)
    before = addresses(model)
    assert addresses(large_pages.settle(model)) == before


def test_a_model_made_in_inference_mode_stays():
    with torch.inference_mode():
        model = Model()
        want, before = model(IDS), addresses(model)
        large_pages.settle(model)
        assert torch.equal(model(IDS), want)
    assert all(addresses(model)[name] == at for name, at in before.items() if not is_settled(tensors(model)[name]))
    with torch.no_grad():
        assert torch.equal(model(IDS), want)


def test_tensors_elsewhere_stay(model):
    model.second.to("meta")
    model.tokens.to("meta")
    large_pages.settle(model)
    assert model.second.idx.is_meta and is_settled(model.first.idx)


@torch.no_grad()
def test_loaded_models_lie_there_but_for_those_that_may_go_to_a_gpu(monkeypatch, tmp_path):
    torch.manual_seed(3)
    dense = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                         vocab_size=256, max_position_embeddings=128, tie_word_embeddings=True)).bfloat16().eval()
    gptvq.quantize(dense, tmp_path / "packed", "2d-2.25-s64", calibration=torch.randint(0, 256, (4, 32)), samples=4, sequence_length=32)
    monkeypatch.setenv("GPTVQ_LARGE_PAGES", "0")
    left, ids = gptvq.load(tmp_path / "packed", device="cpu"), torch.arange(1, 9)[None]
    monkeypatch.delenv("GPTVQ_LARGE_PAGES")
    for model in (gptvq.load(tmp_path / "packed", device="cpu"), AutoModelForCausalLM.from_pretrained(tmp_path / "packed")):
        assert not is_settled(left.lm_head.weight) and all(is_settled(t) for t in model.state_dict().values() if t.numel())
        assert model.lm_head.weight is model.get_input_embeddings().weight and torch.equal(model(ids).logits, left(ids).logits)
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(gptvq.load(tmp_path / "again", device="cpu")(ids).logits, left(ids).logits)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not is_settled(AutoModelForCausalLM.from_pretrained(tmp_path / "packed").lm_head.weight)
    assert is_settled(gptvq.load(tmp_path / "packed", device="cpu").lm_head.weight)
