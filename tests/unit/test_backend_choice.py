"""Which backend serves a device, and what is said where the one asked for cannot."""
import sys
import types
import warnings

import pytest
import torch

import gptvq
from gptvq import ops
from gptvq.backends import cuda, cuda_call, module, native, reference, triton
from gptvq.doctor import diagnose
from gptvq.errors import BackendUnavailable, ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FOUND = {"available": True, "device_count": 1, "runtime": 13000, "driver": 13000, "why": ""}
MISSING = {"available": False, "device_count": 0, "runtime": 13000, "driver": 0}

#: enough for the runtime of torch, and not for that of the kernels
OLD_DRIVER = {**MISSING, "driver": 12080, "why": "CUDA driver version is insufficient for CUDA runtime version"}


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, found): a machine with a made-up GPU, or without."""
    def pretend(capability=(9, 0), found=FOUND, kernels=True):
        monkeypatch.setattr(native, "_C", object())
        monkeypatch.setattr(native, "cuda_info", lambda: found)
        cuda._runtime_works.cache_clear()
        monkeypatch.setattr(cuda_call, "kernels", object() if kernels else None)
        monkeypatch.setattr(cuda, "_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found["driver"] > 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA T4")
    yield pretend
    cuda._runtime_works.cache_clear()


def test_the_first_that_serves_is_taken(gpu, monkeypatch):
    monkeypatch.delenv("GPTVQ_BACKEND", raising=False)
    gpu()
    assert ops.backend(GPU) is cuda and ops.backend(CPU) is native and cuda.serves(GPU) and not cuda.serves(CPU)
    for other, expected in ((True, triton), (False, reference)):
        monkeypatch.setattr(triton, "serves", lambda device, other=other: other)
        gpu((7, 5))
        assert ops.backend(GPU) is expected
        gpu(kernels=False)
        assert ops.backend(GPU) is expected
        gpu(found=OLD_DRIVER)
        assert ops.backend(GPU) is expected
    monkeypatch.setenv("GPTVQ_BACKEND", "reference")
    assert ops.backend(CPU) is reference


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.delenv("GPTVQ_BACKEND", raising=False)
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_why", "cannot be imported (for a reason); do this")
    monkeypatch.setattr(ops, "_warned", False)


def test_a_missing_build_is_said_once(not_built, monkeypatch):
    def multiply(a=torch.ones(2, 2)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ops.matmul(a, a)
        return [str(w.message) for w in seen]

    with monkeypatch.context() as asked:
        asked.setenv("GPTVQ_BACKEND", "reference")
        assert multiply() == []
    assert "is missing" in diagnose()["CUDA in gptvq"] and not ops._warned
    (text,) = multiply()
    assert text.startswith("the reference serves the CPU") and text.endswith("gptvq._C cannot be imported (for a reason); do this")
    assert multiply() == []


def test_a_module_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(gptvq, "_C", types.SimpleNamespace(interface=module.INTERFACE), raising=False)
    assert module.compiled() == (gptvq._C, "")
    for other in (types.SimpleNamespace(), types.SimpleNamespace(interface=module.INTERFACE - 1)):
        monkeypatch.setattr(gptvq, "_C", other)
        found, why = module.compiled()
        assert found is None and "was built from other sources" in why and "pip install" in why
    monkeypatch.delattr(gptvq, "_C")
    monkeypatch.setitem(sys.modules, "gptvq._C", None)
    found, why = module.compiled()
    assert found is None and "cannot be imported" in why and "pip install" in why


@pytest.mark.parametrize("device, machine, message", [
    (GPU, dict(capability=(7, 5)), "NVIDIA T4 has compute capability 7.5, and the kernels need 8.0 or newer"),
    (GPU, dict(kernels=False), "gptvq was built without CUDA"),
    (GPU, dict(capability=(0, 0), found={**MISSING, "why": "CUDA driver version is insufficient for CUDA runtime version"}),
     "no NVIDIA GPU can be used: CUDA driver version is insufficient"),
    (GPU, dict(found=OLD_DRIVER), "no NVIDIA GPU can be used: CUDA driver version is insufficient"),
    (CPU, dict(found={**MISSING, "why": "the driver reports no CUDA device"}), "the driver reports no CUDA device"),
    (CPU, dict(), "its kernels are for device type 'cuda', and the tensor is on 'cpu'"),
])
def test_what_is_missing_is_said(gpu, monkeypatch, device, machine, message):
    gpu(**machine)
    monkeypatch.setenv("GPTVQ_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match=f"GPTVQ_BACKEND=cuda, but .*{message}.*unset it to use another backend"):
        ops.backend(device)


def test_kernels_find_their_device_current(monkeypatch):
    """Else they would go back to the one before, and so make a context on a GPU that nobody uses."""
    class Kernels:
        @staticmethod
        def look(tensor, device, stream):
            return current[-1], device

    current = [0]

    class Entered:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Entered)
    for index in (0, 1):
        with cuda_call.on(torch.device("cuda", index)):
            assert current[-1] == index and len(current) == 1 + index
    monkeypatch.setattr(cuda_call, "kernels", Kernels)
    monkeypatch.setattr(cuda_call, "on", lambda device: Entered(torch.device("cuda", 3)))
    assert cuda_call.call("look", torch.zeros(2)) == (3, 0) and current == [0]


def test_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv("GPTVQ_BACKEND", "magic")
    with pytest.raises(BackendUnavailable, match="'magic' is unknown; choose one of native, cuda"):
        ops.backend(CPU)


def test_what_cuda_refuses_is_an_error_of_ours(monkeypatch):
    """ValueError: an argument; RuntimeError: CUDA itself."""
    class Kernels:
        @staticmethod
        def refuse(*args):
            raise ValueError("idx: got nothing")

        @staticmethod
        def fail(*args):
            raise RuntimeError("kernel: CUDA says: out of memory")

    monkeypatch.setattr(cuda_call, "kernels", Kernels)
    with pytest.raises(ConfigError, match="refuse: idx: got nothing"):
        cuda_call.call("refuse", torch.zeros(2))
    with pytest.raises(BackendUnavailable, match="fail on cpu: kernel: CUDA says: out of memory"):
        cuda_call.call("fail", torch.zeros(2))
    with pytest.raises(ConfigError, match="refuse: got tensors on cpu and meta, need all on one device"):
        cuda_call.call("refuse", torch.zeros(2), torch.zeros(2, device="meta"))


def test_doctor_has_a_line_for_it():
    line = diagnose()["CUDA kernels"]
    assert line.startswith("run on ") if cuda.serves(torch.device("cuda")) else line.startswith("none: ")


@pytest.mark.parametrize("policy, threads, said", [("PASSIVE", 2, True), (" passive", 2, True), ("active", 2, False), ("", 2, False), ("passive", 1, False)])
def test_doctor_tells_of_threads_that_sleep(monkeypatch, policy, threads, said):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert ("sleep" in diagnose()["threads"]) is said
