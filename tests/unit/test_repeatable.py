"""Same inputs, same bytes: every operator a hundred times, and a job in two processes; nothing global is touched."""
import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case

from gptvq import ops
from gptvq.config import Recipe, VQConfig
from gptvq.hessian import Hessian
from gptvq.solver import solve
from gptvq.weight import decode_tables

ROOT = Path(__file__).parents[2]
OPERATORS = ("pack_codes", "unpack_codes", "dequantize", "linear", "matmul", "submatmul", "gram", "cross", "fit", "column_block",
             "descent_block", "decode", "collect")
IN_PLACE = ("submatmul", "gram", "cross")


@pytest.fixture(scope="module")
def calls():
    """{operator: arguments of its largest call} in the solution of real layers, at every activation for linear."""
    recorded = {}

    def record(name, *args):
        size = sum(a.numel() for a in args if isinstance(a, torch.Tensor))
        if name not in recorded or size > recorded[name][0]:
            recorded[name] = size, copy.deepcopy(args)

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATORS:
            real = getattr(ops, name)
            patch.setattr(ops, name, lambda *args, name=name, real=real: (record(name, *args), real(*args))[1])
        W, H = Case("repeat", 96, 320, 2, 2, 16, 64, 16).build(torch.float32)
        x = torch.randn(300, 320)
        hessian = Hessian(320)
        hessian.add(x)
        spec = VQConfig(dim=2, index_bits=3, group_size=2048, scale_block=16).spec(96, 320)
        vq, _ = solve(W, hessian, spec, Recipe(em_iterations=5, passes=2))
        vq.codes()
        vq.dequantize()
        ops.cross(torch.zeros(96, 320), x[:, :96], x)
        ops.linear(x[:5], *decode_tables(vq.spec, vq.buffers), None, vq.spec, "a16")
    return {name: args for name, (_, args) in recorded.items()}


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_hundred_repeats_are_one(name, calls):
    threads = torch.get_num_threads()
    before = surroundings()
    try:
        torch.set_num_threads(3)
        for variant in ("a16", "a8", "fp32") if name == "linear" else (None,):
            args = calls[name] if variant is None else (*calls[name][:-1], variant)
            results = []
            for _ in range(100):
                given = copy.deepcopy(args)
                result = getattr(ops, name)(*given)
                results.append(flat(given[0] if name in IN_PLACE else result))
                if name not in IN_PLACE:
                    assert all(torch.equal(a, b) for a, b in zip(given, args) if isinstance(a, torch.Tensor))    # inputs are read only
            assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(threads)
    assert surroundings() == before


def surroundings() -> dict:
    """Global state that belongs to the caller."""
    return {"torch": torch.get_rng_state().tolist(), "numpy": np.random.get_state()[1].tolist(), "environment": dict(os.environ),
            "default": str(torch.get_default_dtype()), "gradient": torch.is_grad_enabled(), "threads": torch.get_num_threads(),
            "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
            "precision": torch.get_float32_matmul_precision(),
            "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)}


JOB = """
import json, os, random, sys, warnings
import numpy as np, torch
sys.path[:0] = sys.argv[2:4]
from job.tiny_models import build, preset
from unit.test_repeatable import surroundings
import gptvq
torch.manual_seed(int(sys.argv[4])); random.seed(sys.argv[4])
model = build("mixtral")
torch.manual_seed(int(sys.argv[4]))
before = surroundings(), random.getstate(), list(warnings.filters)
gptvq.quantize(model, sys.argv[1], preset("2d-2.25-s64"), calibration=torch.arange(256).view(8, 32))
gptvq.verify(sys.argv[1])
loaded = gptvq.load(sys.argv[1], device="cpu")
loaded(torch.arange(8)[None])
after = surroundings(), random.getstate(), list(warnings.filters)
print(json.dumps([name for name in before[0] if before[0][name] != after[0][name]] + ["random"] * (before[1] != after[1])
                 + ["warnings"] * (before[2] != after[2])))
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    """Whatever the hash seed, the random state and the folder's name; times.json alone holds times."""
    digests = []
    for name in ("one", "two"):
        words = [sys.executable, "-c", JOB, str(tmp_path / name), str(ROOT), str(ROOT / "tests"), str(len(name) + len(digests))]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONHASHSEED": str(len(digests)), "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == []       # what it changed of the caller's
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / name).iterdir()
                        if file.name != "times.json"})
    assert digests[0] == digests[1] and {"config.json", "model.safetensors"} <= set(digests[0])
