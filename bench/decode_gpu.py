"""What bench.decode measures with --shape MODEL: a model of those sizes with random weights, token by token, packed and dense."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
from torch import nn

from gptvq.config import PRESETS, VQConfig
from gptvq.errors import ConfigError
from gptvq.linear import VQLinear
from gptvq.model import linears
from gptvq.weight import VQWeight

from . import device as on
from . import runner
from .contenders import random_weight

#: settings of transformers' LlamaConfig
MODELS = {
    "llama2-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                      vocab_size=32000),
    "llama2-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                       vocab_size=32000),
}
MODES = ("eager", "graph", "compile")
_CACHE = 512                    # tokens that the key and value cache has room for


def measure(args, argv: list[str] | None) -> list[dict]:
    """Rows of every mode; `args` are those of bench.decode."""
    place = on.require(torch.device(args.device))
    runner.check_names("--modes", args.modes, MODES)
    runner.check_names("--presets", args.presets, PRESETS)
    if args.tokens > _CACHE - 8:
        raise ConfigError(f"--tokens: got {args.tokens}, the cache has room for {_CACHE - 8}")
    results = runner.Results("decode", argv, args.json, {"model": args.shape, "tokens": args.tokens, "repeats": args.repeats,
                                                         "cache": _CACHE})
    models = {f"gptvq {preset}": packed(args.shape, VQConfig.preset(preset), place) for preset in args.presets}
    if args.dense:
        models["torch bf16"] = dense(args.shape, place)
    for mode in args.modes:
        results.add(compare(models, mode, args, place))
        runner.log(f"{mode}: {len(results.rows)} rows")
    return results.rows


def dense(shape: str, place: torch.device) -> nn.Module:
    """bfloat16, as transformers initializes it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(place):
            return LlamaForCausalLM(LlamaConfig(**MODELS[shape], max_position_embeddings=4096)).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def packed(shape: str, config: VQConfig, place: torch.device) -> nn.Module:
    """The same with random packed weights in its decoder layers, which are never there as dense ones all at once."""
    from transformers import LlamaConfig, LlamaForCausalLM
    settings = LlamaConfig(**{**MODELS[shape], "num_hidden_layers": 1}, max_position_embeddings=4096)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(place):
            model = LlamaForCausalLM(settings).eval()
            layer = type(model.model.layers[0])
            buffers: dict[tuple, VQWeight] = {}
            for index in range(1, MODELS[shape]["num_hidden_layers"]):
                _pack(model.model.layers[-1], config, buffers)
                model.model.layers.append(layer(settings, index).eval())
            _pack(model.model.layers[-1], config, buffers)
    finally:
        torch.set_default_dtype(before)
    model.config.num_hidden_layers = MODELS[shape]["num_hidden_layers"]
    return model


def _pack(layer: nn.Module, config: VQConfig, made: dict[tuple, VQWeight]) -> None:
    """Every linear of a layer becomes a packed one with buffers of its own; `made` keeps one of each shape."""
    for name, linear in linears(layer, "").items():
        shape, place = tuple(linear.weight.shape), linear.weight.device
        if shape not in made:
            with torch.device("cpu"):
                vq = random_weight(config, *shape)
                gain = 0.02 / float(vq.dequantize().std())
            made[shape] = VQWeight(vq.spec, {**vq.buffers, "gs": vq.buffers["gs"] * gain})
        mine = {buffer: tensor.clone().to(place) for buffer, tensor in made[shape].buffers.items()}
        layer.set_submodule(name.lstrip("."), VQLinear.from_weight(VQWeight(made[shape].spec, mine)))


class Steps:
    """One token after the other: a call feeds the last token, its position and a cache with `room` for as many, all in place."""

    def __init__(self, model: nn.Module, mode: str, place: torch.device, room: int = _CACHE):
        from transformers import StaticCache
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=room)
        self.token, self.position = torch.ones(1, 1, dtype=torch.long, device=place), torch.zeros(1, dtype=torch.long, device=place)
        self.forward: Callable = model.forward
        if mode == "compile":
            torch._dynamo.config.recompile_limit = 64           # models of one class share it, and numbers of threads
            self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        for _ in range(3):
            self.step()
        self.run = on.graphed(self.step, place) if mode == "graph" else self.step

    def step(self) -> None:
        logits = self.forward(input_ids=self.token, position_ids=self.position[None], past_key_values=self.cache, use_cache=True,
                              cache_position=self.position).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def restart(self, prompt: Iterable[int] = ()) -> None:
        """Forgets everything but `prompt`; the token that follows it is the next one to feed."""
        self.cache.reset()
        self.position.zero_()
        for token in prompt:
            self.token.fill_(int(token))
            self.run()


@torch.no_grad()                        # not inference_mode, in which layers called on one input are not computed together
def compare(models: dict[str, nn.Module], mode: str, args, place: torch.device) -> list[dict]:
    steps = {name: Steps(model, mode, place) for name, model in models.items()}

    def sample(name: str) -> float:
        steps[name].restart()
        return on.seconds(steps[name].run, args.tokens, place)

    for name in steps:
        sample(name)
    times = runner.turns({name: lambda name=name: sample(name) for name in steps}, args.repeats)
    rows = []
    for name, model in models.items():
        layers = [module for module in model.modules() if isinstance(module, VQLinear)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        rows.append({"operation": f"decode, {mode}", "method": name.split()[0], "preset": name.split()[1] if layers else None,
                     "format": layers[0].spec.form if layers else "bf16", "device": place.type,
                     "bits_per_value": 8 * sum(layer.packed.nbytes for layer in layers) / weights if layers else 16.0,
                     "threads": torch.get_num_threads(), "tokens": args.tokens, "tokens_per_second": 1 / statistics.median(times[name]),
                     "median_seconds": statistics.median(times[name]), "peak_bytes": on.peak_bytes(place),
                     "speedup": {} if not layers or not args.dense else {"torch bf16": runner.ratio(times, name, "torch bf16")}})
    return rows
