"""Commands about using a checkpoint, on a tiny model: chat, bench, export, completion, and the comparisons of eval."""
import io
import json
import math
import sys
import types

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gptvq import cli
from gptvq.chat import Chat
from gptvq.errors import BackendUnavailable, ConfigError, NumericalError
from gptvq.evaluate import agreement, perplexity
from gptvq.hf import open_model
from gptvq.tasks import run_tasks

TEMPLATE = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


@pytest.fixture(scope="module")
def packed(my_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    assert cli.main(["quantize", str(my_model), str(out), "--calibration", str(my_model.parent / "calibration.txt"), "--samples", "3",
                     "--sequence-length", "64", "--preset", "2d-3.125"]) == 0
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


@pytest.fixture(scope="module")
def talker(packed):
    return open_model(packed, "cpu")


# ---- chat
def test_answers_are_those_of_generate_and_turns_add_up(talker):
    model, tokenizer = talker
    chat, pieces = Chat(model, tokenizer, system="be brief", max_new_tokens=12), []
    answer = chat.say("tear", pieces.append)
    ids = tokenizer("s:be brief\nu:tear\na:", return_tensors="pt").input_ids
    want = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:], skip_special_tokens=True)
    assert answer == "".join(pieces) == want
    chat.say("rats")
    assert [t["role"] for t in chat.turns] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.turns == [] and chat.say("tear") == want


def test_sampling_repeats_and_leaves_the_callers_generator_alone(talker):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    answers = [Chat(*talker, temperature=1.5, max_new_tokens=20, seed=seed).say("rat") for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2] and torch.equal(before, torch.get_rng_state())


def test_an_interrupt_keeps_what_was_said(talker):
    def stop(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    pieces, chat = [], Chat(*talker, max_new_tokens=50)
    with pytest.raises(KeyboardInterrupt):
        chat.say("tear", stop)
    assert chat.turns[-1] == {"role": "assistant", "content": "".join(pieces)} and len(chat.turns) == 2
    chat.say("on")
    assert len(chat.turns) == 4


def test_old_turns_make_room_and_long_messages_are_refused(talker):
    chat = Chat(*talker, max_new_tokens=16)                         # the model has 128 positions
    for _ in range(4):
        chat.say("a" * 30)
    assert 2 <= len(chat.turns) <= 6 and chat.turns[0]["role"] == "user"
    before = list(chat.turns)
    with pytest.raises(ConfigError, match="the message takes .* shorten the message"):
        chat.say("b" * 200)
    with pytest.raises(ConfigError, match="the system prompt and the message take .* shorten the system prompt"):
        Chat(*talker, system="b" * 200).say("a")
    assert chat.turns == before
    assert chat.say("rat") and len(chat.turns) >= 2


def test_refusals(talker, my_model):
    with pytest.raises(ConfigError, match="no chat template"):
        Chat(*open_model(my_model, "cpu"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        Chat(talker[0])
    with pytest.raises(ConfigError, match="temperature"):
        Chat(*talker, temperature=-1.0)
    for text, more in (("\udcff", {}), ("a", {"system": "\udcff"})):
        with pytest.raises(ConfigError, match="need text in UTF-8"):
            Chat(*talker, **more).say(text)
    with pytest.raises(ConfigError, match="seed: got 18446744073709551616"):
        Chat(*talker, seed=2 ** 64)
    Chat(*talker, temperature=1.0, seed=-1, max_new_tokens=1).say("rat")


def test_answers_end_with_the_learned_positions(talker):
    tokenizer = talker[1]
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    chat = Chat(GPT2LMHeadModel(config).eval(), tokenizer, max_new_tokens=100)
    chat.say("rat")
    chat.say("tear")
    assert chat.turns[-2]["content"] == "tear"


def test_chat_command(packed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("tear\n\n/reset\n/what\ntear\n/exit\nnever read\n"))
    assert cli.main(["chat", str(packed), "--max-new-tokens", "8", "--device", "cpu"]) == 0
    answer, rest = capsys.readouterr().out.split("(forgotten)\n")         # a random model's answer may break lines anywhere
    assert len(answer) > 1 and rest.endswith(answer) and "Ctrl-C" in rest.removesuffix(answer)


def test_chat_and_generate_with_text_that_is_not_utf8(packed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert cli.main(["chat", str(packed), "--device", "cpu"]) == 1 and "standard input: got bytes" in capsys.readouterr().err
    assert cli.main(["generate", str(packed), "caf\udce9", "--device", "cpu"]) == 1 and "PROMPT: got" in capsys.readouterr().err


# ---- eval
def test_agreement_against_a_plain_computation(talker, my_model):
    model, tokenizer = talker
    dense, _ = open_model(my_model, "cpu", "float32")
    tokens = tokenizer((my_model.parent / "test.txt").read_text(), return_tensors="pt").input_ids[0]
    seen = []
    found = agreement(model, dense, tokens, 48, 3, lambda *row: seen.append(row))
    kl, same, count = 0.0, 0, 0
    with torch.no_grad():
        for ids in tokens[: 3 * 48].view(3, 1, 48):
            p, q = dense(ids).logits[0, :-1].double().softmax(-1), model(ids).logits[0, :-1].double().softmax(-1)
            kl += float((p * (p / q).log()).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += 47
    assert found["kl"] == pytest.approx(kl / count, rel=1e-4) and found["top1"] == pytest.approx(same / count)
    assert found["perplexity"] == pytest.approx(perplexity(model, tokens, 48, 3)) and found["windows"] == 3
    assert found["dense_perplexity"] == pytest.approx(perplexity(dense, tokens, 48, 3)) and seen[-1][2] == pytest.approx(found["kl"])
    assert agreement(dense, dense, tokens, 48, 2)["kl"] == 0 and agreement(dense, dense, tokens, 48, 2)["top1"] == 1


def test_agreement_refuses(talker):
    model, tokens = talker[0], torch.arange(64)
    with pytest.raises(ConfigError, match="vocabularies differ"):
        agreement(model, lambda_model(model, lambda logits: logits[..., :-1]), tokens, 32)
    with pytest.raises(NumericalError, match="window 1 of 2"):
        agreement(lambda_model(model, lambda logits: logits * math.nan), model, tokens, 32)
    with pytest.raises(ConfigError, match="shorter than one window"):
        agreement(model, model, tokens, 65)


def lambda_model(model, change):
    """`model` with its logits changed."""
    class Changed(torch.nn.Module):
        config = model.config
        inner = model

        def parameters(self, recurse=True):
            return model.parameters()

        def forward(self, **kwargs):
            return types.SimpleNamespace(logits=change(model(**kwargs).logits))

    return Changed()


def test_eval_command_against_the_dense_model(packed, my_model, tmp_path, capsys):
    words = ["eval", packed, "--text", my_model.parent / "test.txt", "--against", my_model, "--window", 48, "--max-windows", 2,
             "--device", "cpu"]
    assert cli.main([*map(str, words), "--json", str(tmp_path / "r.json")]) == 0
    row, out = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    assert f"KL {row['kl']:.4f}" in out and f"{100 * row['top1']:.2f} %" in out and 0 < row["kl"] < 5 and 0 <= row["top1"] <= 1
    for wrong in (["eval", str(packed)], ["eval", str(packed), "--tasks", "piqa", "--against", "x"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(wrong)
        assert stop.value.code == 2


def test_tasks_without_lm_eval(packed, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)               # importing it fails
    assert cli.main(["eval", str(packed), "--tasks", "piqa", "--device", "cpu"]) == 1
    assert "pip install 'lm-eval[hf]'" in capsys.readouterr().err
    with pytest.raises(BackendUnavailable):
        run_tasks(None, None, ["piqa"])


def test_tasks_on_local_data(talker, tmp_path):
    pytest.importorskip("lm_eval", reason="the package lm-eval is not installed")
    rows = [{"query": "rat", "choices": ["tear", "noise"], "gold": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(f"""task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    assert run_tasks(*talker, ["mine"], tmp_path)["mine"] == {"acc": 0.5}          # the same choice every time, right every other
    assert run_tasks(*talker, ["mine"], tmp_path, limit=1)["mine"]["acc"] in (0.0, 1.0)
    with pytest.raises(ConfigError, match="knows no absent"):
        run_tasks(*talker, ["absent"], tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        run_tasks(*talker, ["mine"], tmp_path / "nowhere")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match="cannot run them"):
        run_tasks(*talker, ["mine"], tmp_path)
