"""GGUF files: where there is one, and what of its metadata transformers does not take over."""
from __future__ import annotations

import os
import struct
from pathlib import Path

from . import checkpoint
from .errors import ConfigError

#: llama.cpp's pre-tokenizers that split every digit off before GPT-2's rule.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_file(path: Path) -> Path | None:
    """The file that a path names or that is the only one in a folder without config.json; raises ConfigError for several."""
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; check the path")
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / checkpoint.CONFIG).exists() else []
    if len(files) > 1:
        raise ConfigError(f"{path}: holds {len(files)} .gguf files; name one of them")
    return files[0] if files else None


def mend(path: Path, tokenizer, model) -> None:
    """Special tokens and digit splitting as the file's metadata says; transformers before 5.20 gets both wrong for some files."""
    from tokenizers import pre_tokenizers

    values = metadata(path)
    for token, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = values.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        setattr(tokenizer, f"{token}_token", tokenizer.convert_ids_to_tokens(number))
        for settings in (model.config, model.generation_config) if token != "unk" else ():
            if not isinstance(getattr(settings, f"{token}_token_id", None), list):      # several ends are set on purpose
                setattr(settings, f"{token}_token_id", number)
    if values.get("tokenizer.ggml.pre") in _DIGITS_APART:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])


def metadata(path: Path) -> dict:
    """{key: value} of a GGUF header, arrays left out; package gguf's reader takes seconds, for the vocabulary."""
    with open(path, "rb") as file:
        def number(code: str):
            return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

        def value(kind: int):
            if kind == 8:               # string
                return file.read(number("Q")).decode(errors="replace")
            if kind == 9:               # array: walked over
                inner, count = number("I"), number("Q")
                if inner in (8, 9):
                    for _ in range(count):
                        value(inner)
                else:
                    file.seek(count * struct.calcsize(_NUMBERS[inner]), os.SEEK_CUR)
                return None
            return number(_NUMBERS[kind])

        number("8s"), number("Q")       # magic and version, tensor count
        return {value(8): value(number("I")) for _ in range(number("Q"))}
