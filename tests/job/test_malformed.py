"""Named malformed checkpoints: verify and load refuse each with a FormatError naming file and tensor."""
import json
import os

import pytest
import torch

import gptvq
from bench.damage import join, split
from gptvq import FormatError

ONE, TWO, THREE = (f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3))
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
ENDLESS = "x" * 5000 + ".safetensors"


def holder(folder, tensor):
    return next(file for file in sorted(folder.glob("*.safetensors")) if tensor in split(file.read_bytes())[0])


def header(tensor, change):
    """Changes the header of the file that holds `tensor`."""
    def apply(folder):
        file = holder(folder, tensor)
        values, rest = split(file.read_bytes())
        changed = change(values, values[tensor])
        file.write_bytes(join(values if changed is None else changed, rest))
    return apply


def entry(tensor, **values):
    return header(tensor, lambda all_, one: one.update(values))


def edited(file, change):
    """Changes a JSON file."""
    def apply(folder):
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))
    return apply


def settings(change):
    return edited("config.json", lambda values: change(values["quantization_config"]))


def spec(**values):
    return settings(lambda q: q["layers"][Q].update(values))


def raw(file, change):
    """Changes the bytes of a file."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def value(tensor, number, at=0, dtype="bfloat16"):
    """Sets one number of a tensor."""
    def apply(folder):
        file = holder(folder, tensor)
        values, rest = split(file.read_bytes())
        first, end = values[tensor]["data_offsets"]
        numbers = torch.frombuffer(bytearray(rest[first:end]), dtype=getattr(torch, dtype)).clone()
        numbers[at] = number
        file.write_bytes(join(values, rest[:first] + numbers.view(torch.uint8).numpy().tobytes() + rest[end:]))
    return apply


def text(tensor, old, new):
    """Replaces text in the header of the file that holds `tensor`."""
    def change(values, one):
        before = json.dumps(values)
        assert old in before
        return before.replace(old, new, 1).encode()
    return header(tensor, change)


def special(file, make_it):
    def apply(folder):
        (folder / file).unlink()
        make_it(folder / file)
    return apply


def gap(values, one):
    for other in values.values():
        if "data_offsets" in other and other["data_offsets"][0] >= one["data_offsets"][1]:
            other["data_offsets"] = [offset + 8 for offset in other["data_offsets"]]


def exchanged(values, one):
    other = values[Q + ".sc"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def exchange(folder):
    (folder / ONE).rename(folder / "x")
    (folder / TWO).rename(folder / ONE)
    (folder / "x").rename(folder / TWO)


CASES = {
    # ---- tensor files as such
    "shard missing": (lambda f: (f / TWO).unlink(), TWO),
    "shard empty": (raw(TWO, lambda b: b""), TWO, "0 bytes"),
    "shard of 7 bytes": (raw(TWO, lambda b: b[:7]), TWO, "7 bytes"),
    "shard cut in the header": (raw(TWO, lambda b: b[:200]), TWO, "header"),
    "shard cut in a tensor": (raw(TWO, lambda b: b[:-1]), TWO, "tensor", "data_offsets"),
    "shard with bytes behind": (raw(TWO, lambda b: b + b"\0"), TWO, "end at byte"),
    "shard of zeros": (raw(TWO, lambda b: bytes(len(b))), TWO, "starts with"),
    "shard is a folder": (special(TWO, os.mkdir), TWO, "regular file"),
    "shard is a pipe": (special(TWO, os.mkfifo), TWO, "regular file"),
    "shard never ends": (special(TWO, lambda p: p.symlink_to("/dev/zero")), TWO, "regular file"),
    "shard is a link to nothing": (special(TWO, lambda p: p.symlink_to("nowhere")), TWO),
    "shard is a pickle": (raw(TWO, lambda b: b"\x80\x04\x95\x10\0\0\0\0\0\0\0" + b), TWO, "header"),
    "shards exchanged": (exchange, INDEX, "is not in"),
    "one shard twice": (lambda f: (f / TWO).write_bytes((f / ONE).read_bytes()), TWO, "also in"),
    # ---- the header
    "header length 0": (raw(ONE, lambda b: bytes(8) + b[8:]), ONE, "starts with"),
    "header length of the file": (raw(ONE, lambda b: len(b).to_bytes(8, "little") + b[8:]), ONE, "header claims"),
    "header length 2**63": (raw(ONE, lambda b: (2**63).to_bytes(8, "little") + b[8:]), ONE, "header claims"),
    "header length 2**64 - 1": (raw(ONE, lambda b: b"\xff" * 8 + b[8:]), ONE, "header claims"),
    "header length off by one": (raw(ONE, lambda b: (int.from_bytes(b[:8], "little") - 9).to_bytes(8, "little") + b[8:]), ONE, "JSON"),
    "header is no JSON": (header(Q + ".gs", lambda a, o: b"{nonsense}"), "JSON"),
    "header is a list": (header(Q + ".gs", lambda a, o: b"[]"), "starts with"),
    "header starts with a blank": (header(Q + ".gs", lambda a, o: b" " + json.dumps(a).encode()), "starts with"),
    "header is no UTF-8": (raw(ONE, lambda b: b.replace(b"weight", b"\xff\xfeight")), "JSON"),
    "header nested 100,000 deep": (header(Q + ".gs", lambda a, o: b'{"a":' * 100_000), "JSON"),
    "header of nothing": (header(Q + ".gs", lambda a, o: b"{}"), "end at byte"),
    "key twice": (text(Q + ".gs", "{", f'{{"{Q}.gs": {{}}, '), "twice"),
    "key twice in an entry": (text(Q + ".gs", '"dtype"', '"dtype": "U8", "dtype"'), "twice"),
    "half a surrogate pair": (text(Q + ".gs", Q, "\\ud800" + Q), "JSON"),
    "metadata of numbers": (header(Q + ".gs", lambda a, o: a.update(__metadata__={"format": 1})), "__metadata__"),
    "metadata is a list": (header(Q + ".gs", lambda a, o: a.update(__metadata__=[])), "__metadata__"),
    # ---- entries
    "entry is a number": (header(Q + ".gs", lambda a, o: a.update({Q + ".gs": 4})), Q + ".gs", "need dtype"),
    "entry without dtype": (header(Q + ".gs", lambda a, o: o.pop("dtype") and None), Q + ".gs", "need dtype"),
    "entry with more": (entry(Q + ".gs", device="cuda"), Q + ".gs", "nothing else"),
    "dtype unknown": (entry(Q + ".gs", dtype="BF17"), Q + ".gs", "BF17"),
    "dtype in lower case": (entry(Q + ".gs", dtype="bf16"), Q + ".gs", "bf16"),
    "dtype a list": (entry(Q + ".gs", dtype=["BF16"]), Q + ".gs", "dtype"),
    "dtype of the same size": (entry(Q + ".gs", dtype="F16"), Q + ".gs", "float16", "bfloat16"),
    "signed codes": (entry(Q + ".idx", dtype="I8"), Q + ".idx", "int8", "uint8"),
    "dtype of another size": (entry(Q + ".gs", dtype="F32"), Q + ".gs", "bytes"),
    "shape a number": (entry(Q + ".gs", shape=1), Q + ".gs", "shape"),
    "shape negative": (entry(Q + ".gs", shape=[-1, -1]), Q + ".gs", "shape"),
    "shape a fraction": (entry(Q + ".gs", shape=[1.0, 1]), Q + ".gs", "shape"),
    "shape true": (entry(Q + ".gs", shape=[True, 1]), Q + ".gs", "shape"),
    "shape of strings": (entry(Q + ".gs", shape=["1", "1"]), Q + ".gs", "shape"),
    "shape of 2**62 x 2**62": (entry(Q + ".gs", shape=[2**62, 2**62]), Q + ".gs", "shape"),
    "shape whose product is 0 mod 2**64": (entry(Q + ".gs", shape=[2**32, 2**32]), Q + ".gs", "shape"),
    "shape with 10**400": (entry(Q + ".gs", shape=[10**400]), Q + ".gs", "shape"),
    "shape of no elements, but large": (entry(Q + ".gs", shape=[0, 2**61, 2**61]), Q + ".gs", "shape"),
    "shape of 17 dimensions": (entry(Q + ".gs", shape=[1] * 17), Q + ".gs", "shape"),
    "shape turned round": (entry(Q + ".sz", shape=[2, 1]), Q + ".sz", "(2, 1)", "(1, 2)"),
    "offsets turned round": (header(Q + ".sz", lambda a, o: o.update(data_offsets=o["data_offsets"][::-1])), Q + ".sz", "data_offsets"),
    "offsets three": (entry(Q + ".sz", data_offsets=[0, 1, 2]), Q + ".sz", "data_offsets"),
    "offsets negative": (entry(Q + ".sz", data_offsets=[-4, 0]), Q + ".sz", "data_offsets"),
    "offsets beyond the file": (entry(Q + ".sz", data_offsets=[2**40, 2**40 + 4]), Q + ".sz", "data_offsets"),
    "offsets beyond 64 bits": (entry(Q + ".sz", data_offsets=[2**64, 2**64 + 4]), Q + ".sz", "data_offsets"),
    "offsets -0": (text(Q + ".sz", '"data_offsets": [0,', '"data_offsets": [-0,'), "JSON"),
    "tensors overlap": (header(Q + ".sz", lambda a, o: o.update(data_offsets=[0, 4])), "overlap"),
    "a hole between tensors": (header(Q + ".gs", gap), "data_offsets"),
    "tensors of one file exchanged": (header(Q + ".idx", exchanged), Q + ".idx", "bytes"),
    # ---- which tensors there are
    "tensor renamed": (header(Q + ".gs", lambda a, o: a.update({Q + ".gx": a.pop(Q + ".gs")})), Q + ".gs"),
    "tensor of the dense layer as well": (header(Q + ".gs", lambda a, o: a.update({Q + ".weight": EMPTY})), Q + ".weight"),
    "bias of two dimensions": (entry(Q + ".bias", shape=[1, 16]), Q + ".bias", "(1, 16)", "(16,)"),
    "layer gone from the settings": (settings(lambda q: q["layers"].pop(UP)), "bits_per_value"),
    "index names another file": (edited(INDEX, lambda v: v["weight_map"].update({Q + ".gs": THREE})), INDEX, Q + ".gs"),
    "index lacks a tensor": (edited(INDEX, lambda v: v["weight_map"].pop(Q + ".gs")), INDEX, Q + ".gs", "missing"),
    "index knows one more": (edited(INDEX, lambda v: v["weight_map"].update(stranger=ONE)), INDEX, "stranger"),
    "index leads out": (edited(INDEX, lambda v: v["weight_map"].update({Q + ".gs": "../" + ONE})), INDEX, "../", "plain name"),
    "index leads to the root": (edited(INDEX, lambda v: v["weight_map"].update({Q + ".gs": "/dev/zero"})), INDEX, "/dev/zero"),
    "index leads into a folder": (edited(INDEX, lambda v: v["weight_map"].update({Q + ".gs": "a/b.safetensors"})), INDEX, "plain name"),
    "index with a zero byte": (edited(INDEX, lambda v: v["weight_map"].update({Q + ".gs": "\0.safetensors"})), INDEX, "plain name"),
    "index with an endless name": (edited(INDEX, lambda v: v["weight_map"].update({Q + ".gs": ENDLESS})), INDEX, "plain name"),
    "index of pickles": (edited(INDEX, lambda v: v["weight_map"].update({Q + ".gs": "model.bin"})), INDEX, "model.bin"),
    "index without a map": (edited(INDEX, lambda v: v.pop("weight_map")), INDEX, "weight_map"),
    "index of nothing": (edited(INDEX, lambda v: v.update(weight_map={})), INDEX, "weight_map"),
    "index of numbers": (edited(INDEX, lambda v: v["weight_map"].update({Q + ".gs": 1})), INDEX, "weight_map"),
    "index hashes are a list": (edited(INDEX, lambda v: v["metadata"].update(sha256=[])), INDEX, "sha256"),
    "index hashes of other files": (edited(INDEX, lambda v: v["metadata"]["sha256"].pop(ONE)), INDEX, "sha256"),
    "index missing": (lambda f: (f / INDEX).unlink(), "model.safetensors"),
    # ---- settings
    "config cut": (raw("config.json", lambda b: b[:-9]), "config.json", "JSON"),
    "config of 3 MB": (raw("config.json", lambda b: b" " * 3_000_000 + b), "config.json", "bytes"),
    "config with a key twice": (raw("config.json", lambda b: b.replace(b'"layers"', b'"layers": {}, "layers"', 1)), "config.json", "twice"),
    "config is a folder": (special("config.json", os.mkdir), "config.json"),
    "layers a list": (settings(lambda q: q.update(layers=[])), "layers"),
    "layer a number": (settings(lambda q: q["layers"].update({Q: 5})), Q),
    "layer of another name": (settings(lambda q: q["layers"].update({"x": q["layers"].pop(Q)})), "x.idx", "missing"),
    "layout of the future": (settings(lambda q: q.update(layout_version=99)), "upgrade"),
    "layout true": (settings(lambda q: q.update(layout_version=True)), "layout_version"),
    "setting unknown": (settings(lambda q: q.update(surprise=1)), "surprise"),
    "experts a number": (settings(lambda q: q.update(experts=7)), "experts"),
    "tied a list": (settings(lambda q: q.update(tied=["model.embed_tokens"])), "tied"),
    "tied to no packed head": (settings(lambda q: q.update(tied={"model.embed_tokens": "lm_head"})), "tied"),
    "tied to a number": (settings(lambda q: q.update(tied={"model.embed_tokens": 7})), "tied"),
    "a packed layer tied": (settings(lambda q: q.update(tied={Q: UP})), "tied"),
    "tied with tensors of its own": (settings(lambda q: q.update(tied={"model.embed_tokens": UP})), "tied", "embed_tokens.weight"),
    "bits per value of another model": (settings(lambda q: q.update(bits_per_value=1.5)), "bits_per_value"),
    "experts that are no names": (settings(lambda q: q.update(experts=[7])), "experts"),
    "bits per value beyond any float": (settings(lambda q: q.update(bits_per_value=10**400)), "bits_per_value"),
    "bits per value a string": (settings(lambda q: q.update(bits_per_value="2")), "bits_per_value"),
    "rows of another layer": (spec(rows=32), Q),
    "rows 2**31": (spec(rows=2**31), Q, "rows"),
    "rows 10**30": (spec(rows=10**30), Q, "rows"),
    "rows true": (spec(rows=True), Q, "rows"),
    "rows a string": (spec(rows="16"), Q, "rows"),
    "cols negative": (spec(cols=-16), Q, "cols"),
    "dim without a kernel": (spec(dim=3), Q, "dim=3"),
    "index bits of another format": (spec(index_bits=3), Q, "idx"),
    "group rows 0": (spec(group_rows=0), Q, "group_rows"),
    "group columns that cut a vector": (spec(group_cols=15), Q, "group_cols"),
    "scale block odd": (spec(scale_block=17), Q, "scale_block"),
    "scale block of another size": (spec(scale_block=0), Q + ".s"),
    "rank above the centroids": (settings(lambda q: q["layers"][UP].update(svd_rank=99)), UP, "svd_rank"),
    "format unknown": (spec(colour=1), Q, "colour"),
    "a billion blocks": (edited("config.json", lambda v: v.update(num_hidden_layers=10**9)), "num_hidden_layers"),
    # ---- values
    "a codebook scale that is no number": (value(Q + ".gs", float("nan")), Q + ".gs", "not finite"),
    "a codebook scale without end": (value(Q + ".gs", float("inf")), Q + ".gs", "not finite"),
    "a codebook scale that overflows": (value(Q + ".gs", 3e38), Q, "overflow"),
    "a block scale that is no number": (value(Q + ".sz", float("nan"), 1, "float16"), Q + ".sz", "not finite"),
    "a block scale that overflows": (value(Q + ".sz", 2000.0, 0, "float16"), Q + ".sz", "overflow"),
    "an SVD factor that is no number": (value(UP + ".cb_v", float("-inf"), 3, "float16"), UP + ".cb_v", "not finite"),
}


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_malformed_checkpoints_are_refused(name, copy):
    damage, *parts = CASES[name]
    damage(copy)
    for attempt in (lambda: gptvq.verify(copy, hashes=False), lambda: gptvq.load(copy, device="cpu")):
        with pytest.raises(FormatError) as caught:
            attempt()
        assert all(part in str(caught.value) for part in (str(copy), *parts)), caught.value
        assert len(str(caught.value)) < 2000
