"""A whole model by other packages that quantize on a CPU: HQQ, and llama.cpp's own formats, at the bits that they really store."""
from __future__ import annotations

import collections
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from gptvq.errors import BackendUnavailable
from gptvq.hf import open_model
from gptvq.model import dense_weight

from . import llamacpp
from .perplexity import found_linears

GGUF_TYPE = "Q2_K"              # the smallest file type of llama.cpp that needs no importance matrix


@torch.no_grad()
def hqq_model(model: nn.Module, tokens: Tensor, bits: int, group: int) -> dict:
    """Puts HQQ's own module, which sees no calibration, in the place of every linear of the decoder blocks -> format and size."""
    try:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    except ImportError as error:
        raise BackendUnavailable("hqq is not installed: DISABLE_CUDA=1 pip install hqq") from error
    nbytes = weights = 0
    for name, linear in found_linears(model, tokens).items():
        weight = dense_weight(linear)
        made = HQQLinear(None, BaseQuantizeConfig(nbits=bits, group_size=group, axis=1), compute_dtype=weight.dtype,
                         device=str(weight.device), initialize=False)
        made.quantize(weight.clone(), **made.quant_config)
        made.bias = linear.bias
        model.set_submodule(name, made)
        nbytes += sum(t.numel() * t.element_size() for t in (made.W_q, made.meta["scale"], made.meta["zero"]))
        weights += weight.numel()
    return {"format": f"HQQ int{bits} group {group}", "bits_per_value": 8 * nbytes / weights, "linear_bytes": nbytes}


def gguf_model(source: str, device: str, dtype: str) -> tuple[nn.Module, dict, llamacpp.LlamaModel]:
    """(the model of the .gguf file `source` as llama.cpp writes it in GGUF_TYPE; format and size of the blocks' linears; the same opened by
    llama.cpp, to decode with).

    The embedding stays at 16 bits, as by the other methods.  llama.cpp gives linears whose width is no multiple of 256 a larger type.
    """
    import gguf

    if Path(source).suffix != ".gguf":
        raise BackendUnavailable(f"llama.cpp's formats are measured of a .gguf file, got {source}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.gguf"
        llamacpp.requantize(Path(source), out, GGUF_TYPE, embedding="F16")
        linears = [t for t in gguf.GGUFReader(out).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        types = collections.Counter()
        for t in linears:
            types[t.tensor_type.name] += int(t.n_elements)
        weights, nbytes = types.total(), sum(int(t.n_bytes) for t in linears)
        model, _ = open_model(str(out), device=device, dtype=dtype)
        own = llamacpp.LlamaModel(out)
    shares = ", ".join(f"{count / weights:.0%} {name}" for name, count in types.most_common())
    return model, {"format": f"{GGUF_TYPE}: {shares}", "bits_per_value": 8 * nbytes / weights, "linear_bytes": nbytes}, own
