"""The public names, in every order of import, and the folder-to-folder job with a tokenizer."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from job.tiny_models import build, logits, preset

import gptvq

ROOT = Path(__file__).resolve().parents[2]


def python(code):
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


def test_names():
    assert set(gptvq.__all__) <= set(dir(gptvq))
    for name in gptvq.__all__:
        assert getattr(gptvq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gptvq.nothing


@pytest.mark.parametrize("first", ["import gptvq", "from gptvq.quantize import quantize", "import gptvq.quantize"])
def test_quantize_is_the_function(first):
    assert python(f"{first}; import gptvq; f = gptvq.quantize; from gptvq.quantize import quantize; from gptvq import quantize as g; "
                  "print(callable(f), f is quantize is g is gptvq.quantize)") == "True True"


@pytest.mark.parametrize("name", ["plan", "verify"])
def test_functions_named_like_their_modules(name):
    assert python(f"import gptvq.{name}; from gptvq.{name} import {name} as f; import gptvq; "
                  f"print(f is gptvq.{name}, callable(f))") == "True True"


@pytest.mark.parametrize("first", ["import gptvq, transformers.quantizers.auto", "import transformers.quantizers.auto, gptvq", "import gptvq.hf"])
def test_the_format_is_registered_in_either_order(first):
    assert python(f"{first}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as a, AUTO_QUANTIZATION_CONFIG_MAPPING as b; "
                  "print(a['gptvq'].__name__, b['gptvq'].__name__)") == "GptvqQuantizer PackedGptvqConfig"


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:255])} | {"<end>": 255}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_from_folder_to_folder(tmp_path):
    text = " ".join(f"word{i}" for i in range(200))
    build("qwen2").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    report = gptvq.quantize(tmp_path / "dense", tmp_path / "out", preset(), calibration=text, samples=4, sequence_length=32)
    assert report.model_name == "dense" and report.calibration["samples"] == 4 and report.calibration["source"] == "text"
    from gptvq.hf import open_model
    model, read = open_model(tmp_path / "out", device="cpu")
    ids = read("word7", return_tensors="pt")["input_ids"]
    assert read.eos_token == "<end>" and read.decode(ids[0]) == "word7"
    assert torch.equal(logits(model, ids), logits(report.model, ids))
    assert model.generation_config.eos_token_id == report.model.generation_config.eos_token_id
    in_memory = gptvq.quantize(build("qwen2"), None, preset(), calibration=text, samples=4, sequence_length=32, tokenizer=tokenizer())
    assert in_memory.calibration == report.calibration and torch.equal(logits(in_memory.model, ids), logits(model, ids))


def test_dtype_is_that_of_the_model_unless_asked(tmp_path, ids):
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    assert gptvq.quantize(tmp_path / "dense", None, preset(), calibration=ids).model.dtype == torch.bfloat16
    report = gptvq.quantize(tmp_path / "dense", None, preset(), calibration=ids, dtype="float32")
    assert report.model.dtype == torch.float32 and report.dense_bytes == 4 * report.weights


def test_progress_hears_everything(ids):
    heard = []

    class Ear(gptvq.report.Progress):
        def start(self, total_weights, blocks):
            heard.append(("start", total_weights, blocks))

        def block(self, index, name):
            heard.append(("block", index, name))

        def layer(self, record):
            heard.append(("layer", record.name))

        def finish(self, report):
            heard.append(("finish", report))

    report = gptvq.quantize(build(), None, preset(), calibration=ids, progress=Ear())
    assert heard[0] == ("start", report.weights, 2) and heard[-1] == ("finish", report)
    assert [h[1:] for h in heard if h[0] == "block"] == [(0, "model.layers.0"), (1, "model.layers.1")]
    assert [h[1] for h in heard if h[0] == "layer"] == [r.name for r in report.layers]
    assert set(report.stages) == {"load", "survey", "embed", "hessians", "solve", "forward"} and report.seconds >= sum(report.stages.values())
