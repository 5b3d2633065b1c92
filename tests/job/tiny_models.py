"""Tiny random models of many architectures, built in code, and a job that takes a fraction of a second."""
import torch

import gptvq

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
             max_position_embeddings=64, initializer_range=0.1, eos_token_id=0, bos_token_id=None, pad_token_id=None)
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64, initializer_range=0.1, eos_token_id=0, bos_token_id=None)
# name -> (transformers' prefix, settings, linears per model)
ARCHITECTURES = {
    "llama": ("Llama", {**SMALL, "tie_word_embeddings": False}, 14),
    "llama-tied": ("Llama", {**SMALL, "tie_word_embeddings": True}, 14),
    "llama-bias": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True}, 14),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 8}, 14),
    "qwen2": ("Qwen2", SMALL, 14),
    "gemma": ("Gemma", {**SMALL, "head_dim": 16}, 14),
    "gemma2": ("Gemma2", {**SMALL, "head_dim": 16, "sliding_window": 8}, 14),
    "gpt2": ("GPT2", GPT2, 8),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}, 2 * (4 + 3 * 4)),
    "qwen2-moe": ("Qwen2Moe", {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                               "shared_expert_intermediate_size": 32}, 2 * (4 + 3 * 4 + 3)),
}
QUICK = gptvq.Recipe(em_iterations=5, passes=1, sweeps=1, cg_iterations=3)


def build(name="llama", dtype=torch.float32):
    """A random model; biases and norms are random too, so that losing one shows."""
    import transformers

    prefix, settings, _ = ARCHITECTURES[name]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{prefix}Config")(**settings))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
        parameter.data = parameter.data.to(dtype)       # not model.to(), which would round the rotary tables as well
    return model.eval()


def preset(label="2d-2.25", **changes):
    return gptvq.VQConfig.preset(label, recipe=QUICK, **changes)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits
