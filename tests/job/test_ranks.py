"""Several processes on one job: the bytes of one process, and a clean end where one of them dies."""
import shutil
import signal

import pytest
import torch
from job.test_resume import files

from gptvq import QuantSpec
from gptvq.journal import blocks_done
from gptvq.ranks import Rows

CONFIGS = {"plain": {}, "scales": {"label": "2d-2.25-s64"}, "one-group": {"group_size": 65536}, "rows": {"group_rows": 1, "group_cols": 64}}


def run(forks, **request):
    result = forks.run(**request)
    assert all(r["error"] is None and r["signal"] == 0 for r in (result, *result["others"])), result
    return result


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bytes_of_one_process(forks, folder, tmp_path, name, ranks):
    run(forks, model=folder, out=tmp_path / "one", config=CONFIGS[name])
    run(forks, model=folder, out=tmp_path / "many", config=CONFIGS[name], ranks=ranks)
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("model", ["gpt2"])
def test_other_architectures_in_memory(forks, tmp_path, model):
    run(forks, model=model, out=tmp_path / "one")
    run(forks, model=model, out=tmp_path / "many", ranks=3)
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("samples", [1, 3, 11])
def test_any_number_of_samples(forks, tmp_path, samples):
    """Fewer than chunks, than processes, or not the same number in each chunk; an expert may see tokens in one process only."""
    run(forks, model="mixtral", out=tmp_path / "1", samples=samples)
    for ranks in (2, 3) if samples < 11 else (3, 4, 8):
        run(forks, model="mixtral", out=tmp_path / str(ranks), samples=samples, ranks=ranks)
        assert files(tmp_path / str(ranks)) == files(tmp_path / "1"), ranks


@pytest.mark.parametrize("compensate", [1, 0])
def test_hidden_states_on_the_disk(forks, folder, tmp_path, compensate):
    """Where memory does not hold them: every process keeps its own in files, and the first one those of all."""
    request = {"model": folder, "samples": 5, "recipe": {"compensate": compensate}, "memory": 1000}
    run(forks, **request | {"memory": 1 << 40}, out=tmp_path / "one")
    steps = run(forks, **request, out=tmp_path / "many", ranks=3)["steps"]
    assert files(tmp_path / "many") == files(tmp_path / "one")
    died = forks.run(**request, out=tmp_path / "again", ranks=3, fatal=steps // 2)
    assert died["signal"] == signal.SIGKILL and blocks_done(tmp_path / "again") == 1
    run(forks, **request, out=tmp_path / "again", ranks=2)
    assert files(tmp_path / "again") == files(tmp_path / "one")


def test_tokens_weighed_by_the_loss(forks, folder, tmp_path):
    request = {"model": folder, "samples": 5, "recipe": {"token_weights": "loss"}}
    run(forks, **request, out=tmp_path / "one")
    run(forks, **request, out=tmp_path / "many", ranks=2)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    run(forks, model=folder, samples=5, out=tmp_path / "plain")
    assert files(tmp_path / "plain")["model.safetensors"] != files(tmp_path / "one")["model.safetensors"]


def test_one_process_stops_the_others(forks, tmp_path):
    """What only one process sees, in its samples, ends the job in all."""
    result = forks.run(model="llama", out=tmp_path / "out", samples=4, ranks=2, poisoned=3)
    assert "another process" in result["error"] and result["others"][0]["error"].startswith("NumericalError: embeddings")
    assert not (tmp_path / "out" / "journal").exists()


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_the_job(forks, folder, tmp_path, dies):
    """The others say so and end; the same call goes on, with any number of processes."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    result = run(forks, model=folder, out=whole, ranks=2)
    exchanges = [result, *result["others"]][dies]["exchanges"]
    assert exchanges > 50
    for fatal, blocks in ((1, 0), (exchanges // 3, 0), (2 * exchanges // 3, 1), (exchanges // 2 - 1, 1)):
        result = forks.run(model=folder, out=out, ranks=2, dies=dies, exchange=fatal)
        both = [result, *result["others"]]
        assert both[dies]["signal"] == signal.SIGKILL and both[1 - dies]["signal"] == 0
        assert "another process of this job ended" in both[1 - dies]["error"]
        # Where no block is done rank 0 clears up, unless it is the dead one.
        assert blocks_done(out) == (blocks or (0 if dies == 0 else None))
    run(forks, model=folder, out=out, ranks=3)
    assert files(out) == files(whole)


def test_going_on_with_another_number(forks, folder, tmp_path):
    run(forks, model=folder, out=tmp_path / "whole")
    for first, then in ((1, 2), (2, 1), (3, 2)):
        out = tmp_path / f"{first}-{then}"
        assert forks.run(model=folder, out=out, ranks=first, fatal=34)["signal"] == signal.SIGKILL
        assert (out / "journal" / "block-00000.safetensors").exists()
        run(forks, model=folder, out=out, ranks=then)
        assert files(out) == files(tmp_path / "whole")
        shutil.rmtree(out)


def test_a_complete_checkpoint_and_another_job(forks, folder, tmp_path):
    run(forks, model=folder, out=tmp_path / "out", ranks=2)
    before = files(tmp_path / "out")
    run(forks, model=folder, out=tmp_path / "out", ranks=2)
    refused = forks.run(model=folder, out=tmp_path / "out", ranks=2, config={"label": "2d-3.125"})
    assert refused["error"].startswith("ResumeMismatch") and "another process" in refused["others"][0]["error"]
    assert files(tmp_path / "out") == before
    redone = {"redo": "layers.1.*"}
    run(forks, model=folder, out=tmp_path / "out", ranks=2, samples=3, arguments=redone)
    run(forks, model=folder, out=tmp_path / "one")
    run(forks, model=folder, out=tmp_path / "one", samples=3, arguments=redone)
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.parametrize("rows, group_rows", [(96, 16), (50, 16), (5, 1), (16, 16), (7, 3)])
def test_shares_are_whole_groups(rows, group_rows, monkeypatch):
    spec = QuantSpec(rows, 64, 2, 2, group_rows, 32)
    for size in (1, 2, 3, 8):
        monkeypatch.setattr("gptvq.ranks.size", lambda: size)
        found = []
        for rank in range(size):
            monkeypatch.setattr("gptvq.ranks.rank", lambda: rank)
            share = Rows(spec, shared=True)
            assert share.first % group_rows == 0 and share.spec.rows == share.last - share.first > 0
            found.append((share.first, share.last))
        distinct = sorted(set(found))
        assert distinct[0][0] == 0 and distinct[-1][1] == rows and all(a[1] == b[0] for a, b in zip(distinct, distinct[1:]))
        assert len(distinct) == min(size, spec.row_groups)
    assert Rows(spec).parts == 1
    assert torch.equal(Rows(spec).join(torch.arange(3)), torch.arange(3))
