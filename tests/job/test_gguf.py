"""A GGUF file as the source: weights, special tokens, digit splitting, and a checkpoint that needs the file no more."""
import pytest
import torch
from job.tiny_models import build, logits, preset

import gptvq
from gptvq import ConfigError
from gptvq.hf import open_dense, open_model

gguf = pytest.importorskip("gguf")
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_of(parameter):
    parameter = parameter.replace("model.layers.", "blk.")
    for ours, theirs in NAMES.items():
        parameter = parameter.replace(ours, theirs)
    return parameter


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny Llama with a byte-level vocabulary whose digits stand alone, as llama.cpp would store it."""
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = build("llama")
    tokens = ["<end>", "<start>", "<pad>"] + sorted(ByteLevel.alphabet())[:251] + ["ĠĠ", "ĠĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(256)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 253)
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(2)
    for parameter, tensor in model.state_dict().items():
        if ".q_proj" in parameter or ".k_proj" in parameter:        # llama.cpp interleaves the rotary halves
            heads = 4 if ".q_proj" in parameter else 2
            tensor = tensor.view(heads, 2, -1, 64).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name_of(parameter), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_opened_as_stored(file, ids):
    model, tokenizer, name = open_dense(file, "float32")
    assert name == "tiny.gguf" and torch.allclose(logits(model, ids), logits(build("llama"), ids), atol=1e-5)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<end>", "<start>", "<pad>")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (0, 0)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]     # without digit splitting the space sticks to the digits
    assert open_dense(file)[0].dtype == torch.bfloat16
    assert open_dense(file.parent, "float32")[2] == "tiny.gguf"


def test_to_a_checkpoint(file, tmp_path, ids):
    report = gptvq.quantize(file, tmp_path / "out", preset(), calibration="some words of text " * 20, samples=4, sequence_length=32)
    assert report.model_name == "tiny.gguf" and len(report.layers) == 14
    model, tokenizer = open_model(tmp_path / "out", device="cpu")
    assert model.dtype == torch.bfloat16 and torch.equal(logits(model, ids), logits(report.model, ids))
    assert (tokenizer.eos_token, tokenizer.eos_token_id, model.generation_config.eos_token_id) == ("<end>", 0, 0)
    text = "a  12 and 345"
    assert tokenizer(text)["input_ids"] == report.tokenizer(text)["input_ids"] and tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_damaged_file(file, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:500])
    with pytest.raises(ConfigError, match="cut|cannot load"):
        open_dense(tmp_path / "cut.gguf")
