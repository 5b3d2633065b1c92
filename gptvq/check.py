"""The check behind a run: how far the saved checkpoint is from the dense model, on text that calibration has not seen."""
from __future__ import annotations

from torch import Tensor

from .calibration import check_tokens, require_usable, tokens_sha256
from .evaluate import divergence
from .job import Run
from .machine import trim_memory
from .stream import BlockStream


def held_out_tokens(run: Run, check, unused: Tensor | None, calibration, stream: BlockStream, sequence_length: int) -> Tensor | None:
    """Tokens to compare the saved model on, None to do without."""
    if check is None or run.folder is None:
        return None
    if not (isinstance(check, str) and check == "auto"):
        tokens = check_tokens(check, stream.tokenizer, sequence_length)
        require_usable(stream.model, tokens)
        return tokens
    if unused is None and not isinstance(calibration, Tensor):
        run.note("sequences of 1 token leave nothing to predict, so the result was not checked; give text for that (check=, --check)"
                 if sequence_length == 1 else "no calibration text was left over to check the result on; give some (check=, --check)")
    return unused


def compare(run: Run, wanted: Tensor, tokens: Tensor) -> None:
    """Reads the checkpoint back and notes how far it is from the dense model's logits `wanted` for `tokens`."""
    from .hf import load

    trim_memory()
    run.progress.stage("reading the checkpoint back and comparing it with the dense model")
    with run.timed("check"):
        found = divergence(wanted, load(run.folder, run.device), tokens)
    run.report.check = {**found, "sha256": tokens_sha256(tokens)}
    run.report.save(run.folder)
