"""What a caller's torch.inference_mode() does to a run: nothing."""
import pytest
import torch
from job.tiny_models import build, preset

import gptvq
from gptvq.plan import plan
from gptvq.tune import tune


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_result_is_the_same(name, inside, ids):
    want, model = gptvq.quantize(build(name), None, preset("2d-3.125"), calibration=ids), build(name)
    with torch.inference_mode():
        found = gptvq.quantize(build(name) if inside else model, None, preset("2d-3.125"), calibration=ids)
        assert plan(build(name), preset("2d-3.125"), calibration=ids).packed_bytes == found.packed_bytes
        if (name, inside) == ("llama", False):
            tune(found.model, build(name), ids)
    assert [record.sha256 for record in found.layers] == [record.sha256 for record in want.layers]
