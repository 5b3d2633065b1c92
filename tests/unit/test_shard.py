"""A shard of a packed weight decodes to exactly that part of the weight."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptvq.errors import ConfigError
from gptvq.shard import shard_buffer, shard_spec
from gptvq.spec import QuantSpec
from gptvq.weight import VQWeight
from packed_cases import random_weight

SPECS = [QuantSpec(64, 96, 2, 2, 16, 32), QuantSpec(48, 128, 2, 3, 16, 64, 16), QuantSpec(40, 64, 4, 2, 40, 64), QuantSpec(33, 70, 1, 3, 4, 32),
         QuantSpec(32, 64, 1, 2, 8, 32, 0, 2), QuantSpec(64, 192, 2, 2, 64, 64, 64), QuantSpec(40, 64, 4, 3, 20, 32, 16)]


def cut(vq, rows, cols):
    return VQWeight(shard_spec(vq.spec, rows, cols), {b: shard_buffer(b, t, vq.spec, rows, cols) for b, t in vq.buffers.items()})


@given(st.sampled_from(SPECS), st.data())
def test_any_legal_cut(spec, data):
    vq = random_weight(spec)
    step = max(spec.dim, spec.scale_block)
    first, left = data.draw(st.integers(0, spec.rows - 1)), data.draw(st.integers(0, (spec.cols - 1) // step)) * step
    rows = range(first, data.draw(st.integers(first + 1, spec.rows)))
    cols = range(left, data.draw(st.integers(left + 1, spec.cols)))
    assert torch.equal(cut(vq, rows, cols).dequantize(), vq.dequantize()[rows.start:rows.stop, cols.start:cols.stop])


def test_cuts_at_group_boundaries_add_no_bytes():
    vq = random_weight(SPECS[0])
    halves = [cut(vq, range(i, i + 32), range(96)) for i in (0, 32)]
    assert sum(half.nbytes for half in halves) == vq.nbytes
    assert cut(vq, range(8, 24), range(96)).spec.group_rows == 8            # a cut through groups: smaller ones
    assert cut(vq, range(2, 14), range(96)).spec.group_rows == 12


def test_illegal_cuts_are_refused():
    for spec, cols, says in ((SPECS[0], range(3, 9), "column 3"), (SPECS[1], range(8, 32), "multiple of 16"),
                             (SPECS[0], range(0, 97), "within 96"), (SPECS[0], range(8, 8), "within 96")):
        with pytest.raises(ConfigError, match=says):
            shard_spec(spec, range(16), cols, "layer")
