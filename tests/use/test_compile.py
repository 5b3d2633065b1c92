"""A packed model under torch.compile: one graph for a decoding step with a static cache, the same tokens as eagerly."""
import pytest
import torch

import gptvq
from job.tiny_models import build, preset

IDS = torch.arange(12).view(1, 12) * 7 % 256


@pytest.fixture(scope="module", params=["", "2d-4.125-s64"], ids=["dense head", "packed head"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "model"
    gptvq.quantize(build("llama-tied"), folder, preset("2d-2.25-s64", head=request.param), calibration=IDS.repeat(4, 1))
    return gptvq.load(folder, device="cpu")


def decode(model, step, device="cpu", new_tokens=6):
    """Greedy tokens: the prompt eagerly, every further one by `step`, with a cache of fixed size."""
    from transformers import StaticCache

    cache, ids = StaticCache(config=model.config, max_cache_len=32), IDS.to(device)
    with torch.no_grad():
        token = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        found = [int(token)]
        for i in range(new_tokens):
            at = torch.tensor([[ids.shape[1] + i]], device=device)
            token = step(model, token, at, cache)
            found.append(int(token))
    return found


def step(model, token, at, cache):
    return model(input_ids=token, position_ids=at, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def test_a_decoding_step_is_one_graph(model):
    """fullgraph=True fails on a graph break; the counter says that steps after the first find the graph they need."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    assert decode(model, compiled) == decode(model, step)
    assert counter.frame_count <= 2                         # the first step's cache is a fresh one: it may compile twice


def test_a_step_of_a_model_just_opened_makes_no_tables(model, tmp_path):
    """Else each call would wait for scales made on the CPU, and no CUDA graph could be captured."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    opened, called = AutoModelForCausalLM.from_pretrained(tmp_path), []

    def backend(graph, example):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(opened, fullgraph=True, backend=backend)(input_ids=IDS, use_cache=False)
    assert "gptvq.linear_inference" in called and not any("exp2" in name for name in called)


@pytest.mark.slow
def test_inductor_gives_the_same_tokens(model):
    torch._dynamo.reset()
    assert decode(model, torch.compile(step, fullgraph=True, dynamic=False)) == decode(model, step)


def test_generate_with_a_static_cache(model):
    plain = model.generate(IDS, max_new_tokens=6, do_sample=False)
    static = model.generate(IDS, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(plain, static) and plain.shape[1] > IDS.shape[1]


@pytest.mark.gpu
def test_a_decoding_step_is_captured_and_replayed(model):
    from transformers import StaticCache

    model = model.to("cuda")
    try:
        wanted = decode(model, step, "cuda")
        cache, ids = StaticCache(config=model.config, max_cache_len=32), IDS.cuda()
        with torch.no_grad():
            token = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            at = torch.tensor([[ids.shape[1]]], device="cuda")
            found, stream = [int(token)], torch.cuda.Stream()
            state = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
            saved = [t.clone() for t in state]              # keys, values, and how many tokens they are of
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(model, token, at, cache)               # warms up: nothing may be allocated for the first time in a capture
            torch.cuda.current_stream().wait_stream(stream)
            for kept, t in zip(saved, state):
                t.copy_(kept)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = step(model, token, at, cache)
            for i in range(len(wanted) - 1):
                graph.replay()
                found.append(int(out))
                token.copy_(out)
                at.add_(1)
        assert found == wanted
    finally:
        model.to("cpu")
