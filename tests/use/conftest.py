"""A tiny random Llama with a byte-level tokenizer, saved as a user's model folder would be."""
import random

import pytest


@pytest.fixture(scope="session")
def my_model(tmp_path_factory):
    """Folder `my-model` beside `calibration.txt` and `test.txt`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("use") / "my-model"
    vocab = {char: i for i, char in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(11)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=len(vocab), max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
                         eos_token_id=0, bos_token_id=None, pad_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    rng = random.Random(7)
    for name in ("calibration.txt", "test.txt"):
        words = ["".join(rng.choices("aeiostnr", k=rng.randint(2, 9))) for _ in range(600)]
        (folder.parent / name).write_text(" ".join(words))
    return folder
