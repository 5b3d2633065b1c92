"""Checkpoints of earlier versions keep loading, bit for bit; see tests/golden/README.md."""
import hashlib
import json
from pathlib import Path

import pytest
import torch

import gptvq
from gptvq.spec import FORMATS, LAYOUT_VERSION, SCALE_BLOCKS

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path for path in GOLDEN.glob("v*/*") if path.is_dir())


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_there_are_files_of_every_layout_version():
    assert {path.parent.name for path in FOLDERS} == {f"v{version}" for version in range(1, LAYOUT_VERSION + 1)}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_checkpoints_load_bit_for_bit(folder):
    expected = json.loads(folder.with_suffix(".json").read_text())
    found = gptvq.verify(folder)
    assert found.layers == len(expected) and "layers" in found.hashed
    model = gptvq.load(folder, device="cpu")
    assert {name: sha256(module.dequantize()) for name, module in model.named_modules() if isinstance(module, gptvq.VQLinear)} == expected
    assert torch.isfinite(model(torch.arange(32)[None]).logits).all()
    assert {record.name for record in gptvq.Report.load(folder).layers} == set(expected)


def test_golden_checkpoints_hold_every_format():
    specs = [record.spec for folder in FOLDERS for record in gptvq.Report.load(folder).layers]
    assert {(spec.dim, spec.index_bits) for spec in specs} == set(FORMATS)
    assert {spec.scale_block for spec in specs} == {0, *SCALE_BLOCKS} and any(spec.svd_rank for spec in specs)
