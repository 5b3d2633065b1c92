"""bench.learn on a tiny model: rows before and after, for an adapter and for the codebooks."""
import importlib.util

import pytest

import gptvq
from bench import learn
from bench_runs import bench, check_file
from gptvq import hf
from job.tiny_models import build, preset


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Arguments of a run; models by folder, letters as tokens."""
    import torch

    def letters(text, **_):
        return {"input_ids": [ord(c) for c in text]}

    gptvq.quantize(build("llama"), tmp_path / "packed", preset("2d-2.25"), calibration=torch.arange(96).view(4, 24))
    build("llama").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(learn, "open_model", lambda source: (hf.open_model(source, device="cpu")[0], letters))
    text = tmp_path / "text.txt"
    text.write_text("some words " * 60)
    return ["--packed", tmp_path / "packed", "--train", text, "--text", text, "--steps", 6, "--batch", 2, "--sequence-length", 16,
            "--window", 32, "--max-windows", 2, "--rank", 2, "--json", tmp_path / "learn.json"]


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_an_adapter(opened, capsys):
    assert bench(learn, "lora", *opened, "--rate", 0.01) == 0
    before, after = check_file(opened[-1], "learn")
    assert after["perplexity"] < before["perplexity"] and len(after["losses"]) == 6 and after["adapter_parameters"] > 0
    assert "gptvq + LoRA" in capsys.readouterr().out


def test_the_codebooks(opened):
    assert bench(learn, "tune", *opened, "--rate", 0.003, "--dense", opened[1].parent / "dense") == 0
    dense, before, after = check_file(opened[-1], "learn")
    assert dense["method"] == "dense" and before["method"] == "gptvq" and after["losses"][-1] < after["losses"][0]
    assert after["bits_per_value"] == before["bits_per_value"]


def test_tune_needs_the_dense_model(opened, capsys):
    assert bench(learn, "tune", *opened) == 1
    assert "--dense" in capsys.readouterr().err
