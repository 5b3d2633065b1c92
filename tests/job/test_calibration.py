"""From what the caller names to token windows."""
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import BatchEncoding

from gptvq import ConfigError
from gptvq.calibration import (
    calibration_tokens,
    describe,
    read_text,
    read_tokens,
    tokens_sha256,
)


class Bytes:
    """A tokenizer with one token per byte."""

    def __call__(self, text, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": list(text.encode())}


def windows(text, samples, length, seed=0):
    return calibration_tokens(text, Bytes(), samples, length, seed)


TEXT = "".join(chr(97 + i % 26) + str(i) + " " for i in range(200))


def test_windows_are_pieces_of_the_text():
    tokens = windows(TEXT, 5, 16)
    assert tokens.shape == (5, 16) and tokens.dtype == torch.long
    pieces = {bytes(row.tolist()).decode() for row in tokens}
    assert len(pieces) == 5 and all(piece in TEXT and TEXT.index(piece) % 16 == 0 for piece in pieces)
    many = windows(TEXT, 100, 64)                       # more than fit without overlap
    assert many.shape == (100, 64) and all(bytes(row.tolist()).decode() in TEXT for row in many)
    assert bytes(windows("xxxx xxxxy", 3, 10)[2].tolist()) == b"xxxx xxxxy"


def test_the_seed_alone_decides():
    state = torch.get_rng_state()
    a = windows(TEXT, 4, 16, seed=1)
    torch.manual_seed(99)
    assert torch.equal(a, windows(TEXT, 4, 16, seed=1)) and not torch.equal(a, windows(TEXT, 4, 16, seed=2))
    torch.set_rng_state(state)
    windows(TEXT, 4, 16)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tokenizers_output_is_no_text():
    for output in ({"input_ids": [[1, 2]]}, BatchEncoding({"input_ids": [[1, 2]]})):
        with pytest.raises(ConfigError, match=r"pass \["):
            windows(output, 1, 4)


def test_tensors_are_taken_as_they_are():
    ids = torch.arange(12).view(3, 4)
    assert torch.equal(calibration_tokens(ids.int(), None, 128, 2048, 0), ids)
    for bad in (ids[0], ids.float(), ids[:0], ids - 1, ids.bool()):
        with pytest.raises(ConfigError, match="calibration tokens"):
            calibration_tokens(bad, None, 1, 4, 0)


def test_texts_paths_and_iterables(tmp_path, monkeypatch):
    file = tmp_path / "wiki.txt"
    file.write_text("text of the file é", encoding="utf-8")
    assert read_text(str(file)) == read_text(file) == "text of the file é"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two words").write_text("a file after all")
    assert read_text("wiki.txt") == "text of the file é" and read_text("two words") == "a file after all"
    assert read_text("three more words") == "three more words"
    assert read_text("line\nbreak") == "line\nbreak"
    assert read_text("a" * 300) == "a" * 300
    assert read_text(["one", "two"]) == read_text(part for part in ("one", "two")) == "one\n\ntwo"
    assert read_tokens(file, Bytes()).tolist() == list("text of the file é".encode())
    assert [describe(s) for s in (file, "some text", torch.zeros(1, 1))] == ["wiki.txt", "text", "tokens"]


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/missing/file", "a/b/c", "~/x", Path("missing"), "data\\missing"])
def test_missing_files(source):
    with pytest.raises(ConfigError, match="no such file"):
        read_text(source)


def test_unusable_texts(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00bad")
    for source, match in (("", "is empty"), ("  \n", "is empty"), ([], "is empty"), (tmp_path / "empty.txt", "is empty"),
                          (tmp_path, "is a folder"), (tmp_path / "binary.txt", "cannot be read as UTF-8"), (3, "got int"),
                          (["a", 3], "with a int in it")):
        with pytest.raises(ConfigError, match=match):
            read_text(source)
    with pytest.raises(ConfigError, match="20 tokens is shorter than one window of 21"):
        windows("twenty characters ok", 1, 21)
    with pytest.raises(ConfigError, match="no tokenizer"):
        read_tokens("some text", None)


def test_dataset_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        read_text("owner/some-set")
    asked = []

    class Rows(dict):
        column_names = property(lambda self: list(self))

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "gone":
            raise ConnectionError("offline")
        return Rows(text=["a", "b"]) if name != "pictures" else Rows(image=[])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_text("owner/some-set") == "a\n\nb"
    assert read_text("wikitext:wikitext-2-raw-v1:test") == "a\n\nb"
    assert asked == [("owner/some-set", None, "train"), ("wikitext", "wikitext-2-raw-v1", "test")]
    with pytest.raises(ConfigError, match="cannot be loaded .ConnectionError: offline"):
        read_text("gone")
    with pytest.raises(ConfigError, match="columns .'image'."):
        read_text("pictures")


def test_hash_tells_contents_and_shape():
    ids = torch.arange(12).view(3, 4)
    assert tokens_sha256(ids) == tokens_sha256(ids.int()) == tokens_sha256(ids.T.contiguous().T)
    assert len({tokens_sha256(t) for t in (ids, ids.view(4, 3), ids + 1)}) == 3
