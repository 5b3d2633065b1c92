"""What a layer's error adds to the loss: against autograd through the whole model, and what does not reach the loss."""
import pytest
import torch
import torch.nn.functional as F
from job.tiny_models import build, preset

from gptvq import mixed
from gptvq.errors import NumericalError
from gptvq.model import call
from gptvq.plan import plan
from gptvq.report import Progress
from gptvq.stream import open_stream

CPU = torch.device("cpu")


def shares_of(source, ids):
    stream = open_stream(source, "auto", None)
    stream.survey(ids[:1], CPU)
    return mixed.loss_shares(stream, ids, list(stream.shapes), CPU, Progress())


def plain(model, ids, names):
    """The same by one backward pass through the whole model."""
    outputs, sums = {}, dict.fromkeys(names, 0.0)
    handles = [model.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: outputs.setdefault(name, []).append(y))
               for name in names]
    for row in ids:
        outputs.clear()
        loss = F.cross_entropy(call(model, row[None]).logits[0, :-1].float(), row[1:], reduction="sum")
        flat = [(name, y) for name, ys in outputs.items() for y in ys]
        for (name, y), g in zip(flat, torch.autograd.grad(loss, [y for _, y in flat], allow_unused=True)):
            if g is not None:
                sums[name] += float((g.double().square().sum(-1) * y.detach().double().square().sum(-1)).sum()) / y.shape[-1]
    for handle in handles:
        handle.remove()
    return {name: value / (2 * ids.numel()) for name, value in sums.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_against_one_backward_pass(name, ids):
    model = build(name)
    wanted = {p: p.requires_grad for p in model.parameters()}
    found = shares_of(model, ids)
    assert all(p.requires_grad == wanted.get(p, p.requires_grad) and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    want = plain(model, ids, found)
    assert found.keys() == want.keys() and sum(value > 0 for value in want.values()) > len(want) / 2
    for layer, value in want.items():
        assert found[layer] == pytest.approx(value, rel=1e-3, abs=1e-9), layer


def test_an_error_of_that_size_costs_that_much():
    """On text that the model wrote, whose Fisher matrix is the Hessian but for chance; noise and its opposite cancel the first order."""
    torch.manual_seed(0)
    model, ids = build("llama", torch.float64), torch.randint(0, 250, (256, 1))
    with torch.no_grad():
        for _ in range(15):
            ids = torch.cat([ids, torch.distributions.Categorical(logits=call(model, ids).logits[:, -1]).sample()[:, None]], 1)
    found = shares_of(model, ids)

    @torch.no_grad()
    def loss():
        return float(F.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    before, error = loss(), 0.01
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        risen = 0.0
        for seed in range(40):
            def disturb(m, args, y, seed=seed):
                noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed // 2))
                return y + (-1) ** seed * (error * y.square().sum(-1, keepdim=True) / y.shape[-1]).sqrt() * noise
            handle = model.get_submodule(name).register_forward_hook(disturb)
            risen += (loss() - before) * (ids.shape[1] - 1) / ids.shape[1] / 40
            handle.remove()
        assert risen == pytest.approx(found[name] * error, rel=0.3), name


def test_what_does_not_reach_the_loss_counts_nothing(ids):
    model = build()
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    found = shares_of(model, ids)
    assert found["model.layers.1.self_attn.v_proj"] == found["model.layers.1.self_attn.o_proj"] == 0
    assert found["model.layers.0.self_attn.v_proj"] > 0


def test_gradients_that_are_not_finite_are_named(ids):
    model = build()
    model.lm_head.weight.data[3] = float("inf")
    with pytest.raises(NumericalError, match="layers.1.*the gradient of the loss"):
        shares_of(model, ids)


def test_experts_that_no_token_reached_count_like_the_others(ids):
    """As their Hessians are borrowed; 0 would mean that they are harmless."""
    model = build("mixtral")
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.weight.data[0] = module.weight.data[1] = -module.weight.data[2]
    found = shares_of(model, ids[:1, :2])
    experts = {name: share for name, share in found.items() if ".experts." in name}
    assert len(experts) > 6 and all(share > 0 for share in experts.values()) and len(set(experts.values())) < len(experts)


def test_without_a_loss_all_layers_count_the_same(ids):
    """A model that gives hidden states and no logits, and texts of one token: said, and planned as before."""
    target = {"target_bits": 2.6, "presets": ("2d-2.25", "2d-3.125")}
    found = plan(build().model, preset(), calibration=ids, **target)
    assert not found.shares and any("count the same" in text for text in found.warnings) and 2.4 < found.bits_per_value <= 2.6
    assert shares_of(build(), ids[:, :1]) == {}
    assert not plan(build(), preset(), calibration=ids, **target).warnings
