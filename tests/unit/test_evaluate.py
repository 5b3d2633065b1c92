"""Perplexity against a plain loop in float64, decoding against a loop without a cache, and the refusals."""
import math
import types
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from gptvq import evaluate
from gptvq.errors import ConfigError, NumericalError
from gptvq.evaluate import _cache_names, agreement, decode, default_window, learned_positions, perplexity, tokens_per_second

VOCAB = 61


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=VOCAB, max_position_embeddings=400, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCAB, (1000,), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def plain_perplexity(model, tokens, window):
    """One float64 log-softmax per predicted token."""
    losses = []
    for start in range(0, len(tokens) - window + 1, window):
        logits = model(input_ids=tokens[None, start:start + window]).logits[0].double()
        for t in range(window - 1):
            row = logits[t]
            losses.append(float(row.exp().sum().log() - row[tokens[start + t + 1]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("window", [2, 64, 300])        # 300 crosses a chunk of the log-softmax; all leave a partial window or fit
def test_matches_a_plain_loop(model, tokens, window):
    assert perplexity(model, tokens, window) == pytest.approx(plain_perplexity(model, tokens, window), rel=1e-5)


def test_last_partial_window_is_dropped(model, tokens):
    assert perplexity(model, tokens[:127], 64) == perplexity(model, tokens[:64], 64)
    assert perplexity(model, tokens, 64, max_windows=2) == perplexity(model, tokens[:128], 64)
    assert perplexity(model, tokens, 64, max_windows=10_000) == perplexity(model, tokens, 64)


def test_a_model_that_knows_nothing_scores_its_vocabulary(model, tokens):
    head = model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert perplexity(model, tokens, 100) == pytest.approx(VOCAB, rel=1e-6)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(head)


def test_default_window_is_what_the_model_sees(model, tokens):
    assert default_window(model) == 400
    assert perplexity(model, tokens) == perplexity(model, tokens, 400)


def test_training_mode_is_put_back_and_progress_is_told(model, tokens):
    seen = []
    model.train()
    value = perplexity(model, tokens, 250, device="cpu", progress=lambda *args: seen.append(args))
    assert model.training
    model.eval()
    assert [s[:2] for s in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)] and seen[-1][2] == pytest.approx(value)


def test_nan_is_an_error_that_names_the_window(model, tokens):
    bias = model.model.norm.weight
    old = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[3] = math.nan
        with pytest.raises(NumericalError, match="window 1 of 10"):
            perplexity(model, tokens, 100)
    finally:
        with torch.no_grad():
            bias.copy_(old)


@pytest.mark.parametrize("window, most, says", [(1001, None, "1000 tokens is shorter than one window of 1001"), (1, None, "window: got 1"),
                                                (100, 0, "max_windows: got 0")])
def test_refusals(model, tokens, window, most, says):
    with pytest.raises(ConfigError, match=says):
        perplexity(model, tokens, window, most)


@torch.no_grad()
def test_decode_is_greedy(model, tokens):
    prompt = tokens[:9]
    ids, speed = decode(model, prompt, 12)
    text = prompt[None]
    for _ in range(12):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    assert ids == text[0, 9:].tolist() and speed > 0
    assert tokens_per_second(model, prompt, 2) > 0
    with pytest.raises(ConfigError, match="prompt of 0 tokens"):
        decode(model, tokens[:0], 4)


def test_the_speed_is_that_of_the_steps_behind_the_first(model, tokens, monkeypatch):
    """By a clock that stands still but for 1 s in every call of the model: the prompt's is not timed, and four make five tokens."""
    now = [0.0]
    monkeypatch.setattr(evaluate, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    handle = model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    try:
        assert decode(model, tokens[:9], 5)[1] == tokens_per_second(model, tokens[:9], 2) == 1.0
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_no_further_than_the_learned_positions(kind, model, tokens):
    size = {"vocab_size": VOCAB, "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    short = GPT2LMHeadModel(GPT2Config(**size, n_embd=32, n_layer=1, n_head=2)) if kind == "gpt2" else OPTForCausalLM(
        OPTConfig(**size, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2))
    assert learned_positions(short) == 24 and learned_positions(model) is None
    assert perplexity(short, tokens[:48], 24) > 1 and len(decode(short, tokens[:20], 5)[0]) == 5
    for call in (lambda: perplexity(short, tokens, 25), lambda: agreement(model, short, tokens, 25), lambda: decode(short, tokens[:20], 6)):
        with pytest.raises(ConfigError, match="need .*; the model has learned 24 positions"):
            call()


def test_a_module_without_a_config(model, tokens):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = model

        def forward(self, input_ids, **arguments):
            return self.inside(input_ids, **arguments)

    warnings.simplefilter("error", FutureWarning)                   # of an argument that transformers renamed
    assert perplexity(Bare(), tokens, 50) == perplexity(model, tokens, 50)
    assert decode(Bare(), tokens[:5], 6)[0] == decode(model, tokens[:5], 6)[0] and agreement(Bare(), model, tokens, 50)


def test_the_cache_is_passed_on_under_the_models_own_name():
    old, new = SimpleNamespace(past_key_values=1), SimpleNamespace(cache=1)
    models = [SimpleNamespace(forward=forward) for forward in (lambda input_ids, past_key_values=None: 0, lambda input_ids, cache=None: 0,
                                                               lambda **arguments: 0)]
    assert [_cache_names(model, old) for model in models] == [("past_key_values", "past_key_values")] * 3
    assert [_cache_names(model, new) for model in models] == [("cache", "past_key_values"), ("cache", "cache"), ("cache", "cache")]
