"""Calibration and evaluation text: from what the caller names to token ids."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import ConfigError

_LONGEST_NAME = 255
_CHECK_WINDOWS, _CHECK_TOKENS = 4, 512
_TEXT_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".html", ".xml", ".raw", ".tokens")


def calibration_tokens(source, tokenizer, samples: int, sequence_length: int, seed: int) -> Tensor:
    """The first result of `calibration_windows`."""
    return calibration_windows(source, tokenizer, samples, sequence_length, seed)[0]


def calibration_windows(source, tokenizer, samples: int, sequence_length: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Long [samples, sequence_length] token ids, the windows chosen by a local generator with `seed`; and unused ones.

    `source`: whatever `read_text` takes, or an integer tensor [samples, tokens], which is used as it is.  The text is
    tokenized once, without special tokens, and cut into windows: different ones without overlap where it is long enough
    for that, any positions otherwise.  Raises ConfigError for text shorter than one window.  The second result is the
    beginnings of the last windows that were not chosen, [up to 4, up to 512] ids to check the result with, or None where
    there are none.
    """
    if isinstance(source, Tensor):
        return _checked_ids(source), None
    for name, value in (("samples", samples), ("sequence_length", sequence_length)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a positive integer, got {value!r}")
    tokens = read_tokens(source, tokenizer, "calibration text")
    if len(tokens) < sequence_length:
        raise ConfigError(f"calibration text of {len(tokens)} tokens is shorter than one window of {sequence_length}: "
                          "give more text, or a smaller sequence_length")
    generator = torch.Generator().manual_seed(seed)
    windows = len(tokens) // sequence_length
    if windows >= samples:
        order = torch.randperm(windows, generator=generator)
        starts, unused = order[:samples] * sequence_length, order[samples:].sort().values * sequence_length
    else:
        starts = torch.randint(len(tokens) - sequence_length + 1, (samples,), generator=generator)
        unused = torch.tensor(range(int(starts.max()) + sequence_length, len(tokens) - sequence_length + 1, sequence_length))
    size = min(sequence_length, _CHECK_TOKENS)
    held_out = [tokens[s: s + size] for s in unused[-_CHECK_WINDOWS:].tolist()] if size > 1 else []
    return torch.stack([tokens[s: s + sequence_length] for s in starts.tolist()]), torch.stack(held_out) if held_out else None


def check_tokens(source, tokenizer, sequence_length: int) -> Tensor:
    """[up to 4, up to 512] ids from the beginning of a text that the caller names for the check."""
    if isinstance(source, Tensor):
        return _checked_ids(source)
    tokens = read_tokens(source, tokenizer, "check text")
    size = min(sequence_length, _CHECK_TOKENS, len(tokens))
    if size < 2:
        raise ConfigError("check text: got 1 token, need at least 2 to predict one from the other; give more text")
    return tokens[: len(tokens) // size * size].view(-1, size)[:_CHECK_WINDOWS]


def read_tokens(source, tokenizer, what: str = "text") -> Tensor:
    """Long [n]: all of `source` (see `read_text`) tokenized at once, without special tokens."""
    text = read_text(source, what)
    if tokenizer is None:
        raise ConfigError(f"{what}: there is no tokenizer to turn it into tokens; pass tokenizer=, or token ids as an integer tensor")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not len(ids):
        raise ConfigError(f"{what}: the tokenizer made no tokens of {len(text)} characters; give some text")
    return torch.tensor(ids, dtype=torch.long)


def read_text(source, what: str = "text") -> str:
    """One string from a text, a path, a dataset's name, or an iterable of strings (joined by blank lines).

    A string that names an existing file is its path.  Otherwise one with whitespace in it or of more than 255
    characters is the text itself; one that looks like a path (separators at the start or more than one, a text file's
    suffix) is a missing file; and the rest is a dataset for the `datasets` package, "name[:config[:split]]", of which
    the "text" column is read, by default of the split "train".
    """
    if isinstance(source, (str, os.PathLike)):
        text = _from_string(source, what)
    elif isinstance(source, Mapping):
        raise ConfigError(f"{what}: got {type(source).__name__} with the keys {', '.join(map(repr, source))}, need a text, a path, a "
                          "dataset name, strings or an integer tensor; of a tokenizer's output pass [\"input_ids\"], made with "
                          "return_tensors=\"pt\"")
    elif isinstance(source, Iterable):
        parts = list(source)
        wrong = next((part for part in parts if not isinstance(part, str)), None)
        if wrong is not None:
            raise ConfigError(f"{what}: got an iterable with a {type(wrong).__name__} in it, need strings; token ids go in as an "
                              "integer tensor [samples, tokens]")
        text = "\n\n".join(parts)
    else:
        raise ConfigError(f"{what}: got {type(source).__name__}, need a text, a path, a dataset name, strings or an integer tensor")
    if not text.strip():
        raise ConfigError(f"{what}: {_short(source)} is empty; give some text")
    return text


def tokens_sha256(tokens: Tensor) -> str:
    """Content hash of token ids: shape, then the ids as little-endian int64."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def describe(source) -> str:
    """A short name of `source` for the report."""
    if isinstance(source, Tensor):
        return "tokens"
    if isinstance(source, os.PathLike) or (isinstance(source, str) and _is_name(source)):
        return Path(source).name if os.path.isfile(source) else str(source)
    return "text"


def _is_name(source: str) -> bool:
    return len(source) <= _LONGEST_NAME and (os.path.exists(source) or not any(c.isspace() for c in source.strip()))


def _from_string(source: str | os.PathLike, what: str) -> str:
    if isinstance(source, str) and (not source.strip() or not _is_name(source)):
        return source
    path = Path(source)
    if path.is_dir():
        raise ConfigError(f"{what}: {path} is a folder; name a text file in it")
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{what}: {path} cannot be read as UTF-8 text ({error}); convert it, or choose another file") from error
    name = os.fspath(source)
    if (isinstance(source, os.PathLike) or name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name
            or path.suffix.lower() in _TEXT_SUFFIXES):
        raise ConfigError(f"{what}: no such file: {name}; check the path (in {Path.cwd()})")
    return _dataset_text(name, what)


def _dataset_text(name: str, what: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{what}: {name!r} is no existing file, so it is taken for a dataset's name, which needs the package "
                          "`datasets`: pip install datasets, or give a text file or the text itself") from error
    dataset, *rest = name.split(":")
    config, split = (*rest, None, None)[:2]
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train")
    except Exception as error:      # datasets raises whatever the network, the hub or a parser does
        raise ConfigError(f"{what}: dataset {name!r} cannot be loaded ({type(error).__name__}: {error}); write name[:config[:split]], "
                          "or give a text file") from error
    if "text" not in rows.column_names:
        raise ConfigError(f"{what}: dataset {name!r} has the columns {rows.column_names}, need one called 'text'; pass its strings instead")
    return "\n\n".join(rows["text"])


def _checked_ids(ids: Tensor) -> Tensor:
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"calibration tokens: got {ids.dtype} {tuple(ids.shape)}, need integers [samples, tokens]")
    if not ids.numel():
        raise ConfigError(f"calibration tokens: got an empty tensor {tuple(ids.shape)}; give at least one sample")
    if int(ids.min()) < 0:
        raise ConfigError(f"calibration tokens: got the id {int(ids.min())}, need ids >= 0")
    return ids.detach().to("cpu", torch.long)


def _short(source) -> str:
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
    return repr(text[:60]) if text.strip() else "it"


def text_config(model: nn.Module):
    """Settings of the language model in it; None for a module without a config."""
    settings = getattr(model, "config", None)
    return settings.get_text_config() if hasattr(settings, "get_text_config") else settings


def random_tokens(model: nn.Module, samples: int, sequence_length: int) -> Tensor:
    """Ids [samples, sequence_length or as many positions as the model has], always the same."""
    settings, generator = text_config(model), torch.Generator().manual_seed(0)
    length = min(sequence_length, getattr(settings, "max_position_embeddings", None) or sequence_length)
    return torch.randint(getattr(settings, "vocab_size", None) or 2, (samples, length), generator=generator)


def require_usable(model: nn.Module, tokens: Tensor) -> None:
    """Raises ConfigError for ids beyond the vocabulary and for samples longer than the model's positions."""
    settings = text_config(model)
    vocabulary = getattr(settings, "vocab_size", None)
    if vocabulary and int(tokens.max()) >= vocabulary:
        raise ConfigError(f"calibration tokens: got the id {int(tokens.max())}, the model's vocabulary ends at {vocabulary - 1}; use the "
                          "model's own tokenizer")
    positions = getattr(settings, "max_position_embeddings", None)
    if positions and tokens.shape[1] > positions:
        raise ConfigError(f"calibration samples of {tokens.shape[1]} tokens are longer than the model's {positions} positions; set "
                          f"sequence_length={positions} or less")
