"""What torch.compile sees of a layer that was never called: its kernel, and nothing that is made anew on each call."""
import copy
import io
import pickle

import pytest
import torch
from packed_cases import compiled_noting, random_weight
from torch import nn

from gptvq import QuantSpec, VQLinear
from gptvq.embedding import VQEmbedding

SCALES, SVD = QuantSpec(40, 96, 2, 3, 16, 96, 32), QuantSpec(40, 96, 1, 3, 16, 32, 16, 3)


def loaded(vq):
    """Into a layer that was made empty, as a checkpoint's tensors come."""
    file = io.BytesIO()
    torch.save(vq.state_dict(), file)
    file.seek(0)
    empty = VQLinear(vq.spec, bias=vq.bias is not None)
    empty.load_state_dict(torch.load(file))
    return empty


def emptied(vq):
    state = {name: t.clone() for name, t in vq.state_dict().items()}
    vq.to_empty(device="cpu").load_state_dict(state)
    return vq


def assigned(vq):
    with torch.device("meta"):
        empty = VQLinear(vq.spec, bias=vq.bias is not None)
    empty.load_state_dict(vq.state_dict(), assign=True)
    return empty


def graphs_of(model, *inputs):
    """The graphs of two calls, and whether these gave what `model` gives."""
    compiled, graphs = compiled_noting(model)
    with torch.no_grad():
        found = [compiled(*inputs) for _ in range(2)]
        return graphs, all(torch.equal(y, model(*inputs)) for y in found)


def calls(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op.startswith("call_")]


WAYS = {"made": lambda vq: vq, "moved": lambda vq: vq.to("cpu"), "cast": lambda vq: vq.half().float(), "copied": copy.deepcopy,
        "pickled": lambda vq: pickle.loads(pickle.dumps(vq)), "loaded": loaded, "assigned": assigned,
        "emptied": emptied, "moved after a call": lambda vq: (vq(torch.ones(1, 96)), vq.to("cpu"))[1]}


@pytest.mark.parametrize("spec", [SCALES, SVD], ids=["scales", "svd"])
@pytest.mark.parametrize("way", WAYS)
def test_the_graph_of_a_fresh_layer_is_its_kernel(way, spec):
    with torch.no_grad():
        vq = WAYS[way](VQLinear.from_weight(random_weight(spec), torch.randn(40)))
    graphs, equal = graphs_of(nn.Sequential(vq), torch.randn(2, 96))
    assert equal and [calls(graph) for graph in graphs] == [["gptvq.linear_inference"]]


def test_the_graph_of_a_fresh_embedding_makes_no_scales():
    table = VQEmbedding.of(random_weight(SCALES), torch.float32)
    graphs, equal = graphs_of(table, torch.tensor([3, 39, 0]))
    assert equal and not any("exp2" in call or call == "cpu" for graph in graphs for call in calls(graph))
