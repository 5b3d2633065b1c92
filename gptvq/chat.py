"""A conversation with a model, answered piece by piece."""
from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import nn

from .calibration import text_config
from .errors import ConfigError
from .evaluate import learned_positions

_LEAST_TEMPERATURE = 1e-30       # logits divided by it are numbers still


class Chat:
    """Turns of a conversation.  `say` streams an answer; Ctrl-C in it keeps what was said so far and passes the interrupt on.

    `model` is a folder, hub id or .gguf file, or a model whose `tokenizer` is given.  ConfigError: no tokenizer, or none with a
    chat template.  With `temperature` 0 the likeliest token is taken; else `seed` decides, and the caller's generator stays as it is.
    """

    def __init__(self, model: str | os.PathLike | nn.Module, tokenizer=None, *, system: str = "", temperature: float = 0.0,
                 max_new_tokens: int = 512, seed: int = 0):
        if not isinstance(model, nn.Module):
            from .hf import open_model
            model, tokenizer = open_model(model)
        if tokenizer is None:
            raise ConfigError("chat: the model has no tokenizer; copy its tokenizer files into its folder")
        if not tokenizer.chat_template:
            raise ConfigError("chat: this model's tokenizer has no chat template, so it was made for no conversations; use `gptvq generate`")
        check_sampling(temperature, seed)
        require_text(system, "the system prompt")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self._opening = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forgets the conversation, not the system prompt."""
        self.turns = []

    def say(self, text: str, write: Callable[[str], None] = lambda piece: None) -> str:
        """The answer to `text`, each piece passed to `write` as it comes.  ConfigError: a message longer than the model's positions."""
        require_text(text, "the message")
        turns, ids = self._fitting([*self.turns, {"role": "user", "content": text}])
        streamer, most = _Streamer(self.tokenizer, write), learned_positions(self.model)
        new_tokens = self.max_new_tokens if most is None else min(self.max_new_tokens, most - ids.shape[1] + 1)
        ids = ids.to(next(self.model.parameters()).device)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(self.seed + len(turns))
                self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                                    streamer=streamer, **sampling)
        except KeyboardInterrupt:
            self._answered(turns, streamer.text)
            raise
        self._answered(turns, streamer.text)
        return streamer.text

    def _answered(self, turns: list[dict[str, str]], text: str) -> None:
        self.turns = [*turns, {"role": "assistant", "content": text}]

    def _fitting(self, turns: list[dict[str, str]]):
        """(turns, their ids [1, n]) without the oldest exchanges, where the model's positions would not hold them."""
        room = getattr(text_config(self.model), "max_position_embeddings", None)
        while True:
            ids = self.tokenizer.apply_chat_template(self._opening + turns, add_generation_prompt=True, return_tensors="pt",
                                                     return_dict=True)["input_ids"]
            if not room or ids.shape[1] + min(self.max_new_tokens, room // 4) <= room:
                return turns, ids
            if len(turns) <= 1:
                longest = max(self._opening + turns, key=lambda turn: len(turn["content"]))
                what, s = ("the system prompt and the message", "") if self._opening else ("the message", "s")
                raise ConfigError(f"chat: {what} take{s} {ids.shape[1]} of the model's {room} positions and leave{s} no room for an "
                                  f"answer; shorten the {'system prompt' if longest['role'] == 'system' else 'message'}")
            turns = turns[2:]


def check_sampling(temperature: float, seed: int, option: str = "") -> None:
    """Raises ConfigError, the names behind `option`, for what no sampling can be done with."""
    if not (temperature == 0 or _LEAST_TEMPERATURE <= temperature < math.inf):
        raise ConfigError(f"{option}temperature: got {temperature}, need 0 (no sampling) or a number from {_LEAST_TEMPERATURE} up")
    if not -1 << 63 <= seed < 1 << 63:
        raise ConfigError(f"{option}seed: got {seed}, need a whole number of 64 bits, for instance 0")


def require_text(text: str, what: str) -> None:
    """Raises ConfigError for text of bytes that are no UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what}: got {text[error.start]!r} at character {error.start + 1}, need text in UTF-8; convert it") from error


class _Streamer:
    """Takes ids as `generate` finds them; whole characters go out, words that may still change wait."""

    def __init__(self, tokenizer, write: Callable[[str], None]):
        self.tokenizer, self.write = tokenizer, write
        self.text, self._ids, self._prompt = "", [], True

    def put(self, ids) -> None:
        if self._prompt:                                # generate hands over the prompt first
            self._prompt = False
            return
        self._ids += ids.flatten().tolist()
        self._emit(self.tokenizer.decode(self._ids, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        self._emit(self.tokenizer.decode(self._ids, skip_special_tokens=True))

    def _emit(self, text: str) -> None:
        piece, self.text = text[len(self.text):], text if len(text) > len(self.text) else self.text
        if piece:
            self.write(piece)
