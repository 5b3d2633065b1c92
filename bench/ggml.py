"""ggml's matrix products as llama.cpp runs them on this CPU, by ctypes over the libraries of an installed Python package."""
from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import mmap
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import numpy as np

from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.large_pages import why_not

# module, distribution, folder of its libraries; the first one compiles on the user's machine, for its instruction set
PACKAGES = (("llama_cpp", "llama-cpp-python", "lib"), ("libggml", "libggml-python", "lib64"))
TYPES = {"Q4_0": 2, "Q4_K": 12, "Q2_K": 10}
FLOAT32 = 0
INSTRUCTION_SETS = ("avx2", "avx512", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "amx_int8", "neon", "dotprod", "matmul_int8",
                    "sve")


class _InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _ThreadpoolParams(Structure):
    _fields_ = [("cpumask", c_bool * 512), ("n_threads", c_int), ("prio", c_int), ("poll", c_uint32), ("strict_cpu", c_bool),
                ("paused", c_bool)]


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_QUIET = _Log(lambda level, text, data: None)
_BASE = {  # function: result, arguments
    "ggml_version": (c_char_p,), "ggml_log_set": (None, _Log, c_void_p),
    "ggml_init": (c_void_p, _InitParams), "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,), "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64), "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool), "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_row_size": (c_size_t, c_int, c_int64), "ggml_blck_size": (c_int64, c_int),
    "ggml_quantize_chunk": (c_size_t, c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_threadpool_params_init": (None, POINTER(_ThreadpoolParams), c_int),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t), "ggml_backend_buffer_get_base": (c_void_p, c_void_p),
    "ggml_backend_buffer_get_size": (c_size_t, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p), "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p), "ggml_backend_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_free": (None, c_void_p), "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p), "ggml_backend_cpu_buffer_type": (c_void_p,),
}
_CPU = {
    "ggml_backend_cpu_reg": (c_void_p,), "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int), "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_threadpool_new": (c_void_p, POINTER(_ThreadpoolParams)), "ggml_threadpool_pause": (None, c_void_p),
}


class Ggml:
    """The loaded libraries: `version` of ggml, `package` it came with, `instructions` it was compiled for."""

    def __init__(self, folder: Path, package: str):
        # by the names that libllama.so asks for, so that the process has one copy of each
        base = ctypes.CDLL(str(folder / "libggml-base.so.0"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so.0"), mode=ctypes.RTLD_GLOBAL)
        for library, functions in ((base, _BASE), (cpu, _CPU)):
            for name, (result, *arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.package = f"{package} {importlib.metadata.version(package)}"
        self.version = self.version().decode()
        self.instructions = [name for name in INSTRUCTION_SETS if getattr(cpu, f"ggml_cpu_has_{name}")()]
        self.openmp = b"libgomp" in (folder / "libggml-cpu.so.0").read_bytes()    # then OMP_WAIT_POLICY rules its threads
        self.log_set(_QUIET, None)
        self.backend, self.pools = self.backend_cpu_init(), {}

    def buffer_types(self) -> list[int]:
        """Buffer types for weights in the order in which llama.cpp tries them, the plain one last."""
        reg = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts")
        found, i = [], 0
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(reg, 0))
            while extra and extra[i]:
                found.append(extra[i])
                i += 1
        return [*found, self.backend_cpu_buffer_type()]

    def context(self, tensors: int, nodes: int = 0) -> int:
        """A context for the headers of `tensors` tensors and, with `nodes`, one graph; freed with `free`."""
        size = (tensors + 8) * self.tensor_overhead() + (self.graph_overhead_custom(nodes, False) if nodes else 0)
        return self.init(_InitParams(size, None, True))

    def threadpool(self, threads: int) -> int:
        """The pool of so many threads; it lives as long as the process, as llama.cpp's does."""
        if threads not in self.pools:
            params = _ThreadpoolParams()
            self.threadpool_params_init(params, threads)
            self.pools[threads] = self.threadpool_new(params)
        return self.pools[threads]


@functools.cache
def load() -> Ggml:
    """BackendUnavailable where no installed package carries ggml's CPU libraries, or they do not load."""
    reasons = []
    for module, package, libraries in PACKAGES:
        spec = importlib.util.find_spec(module)
        folder = Path(spec.origin).parent / libraries if spec and spec.origin else None
        if folder is None or not (folder / "libggml-cpu.so.0").is_file():
            continue
        try:
            return Ggml(folder, package)
        except (OSError, AttributeError) as error:      # another C library, or functions of another ggml
            reasons.append(f"{package}: {error}")
    raise BackendUnavailable("; ".join(reasons) or "ggml is not installed: CMAKE_ARGS=-DGGML_OPENMP=OFF pip install llama-cpp-python "
                             "(compiles, 10 minutes) or pip install libggml-python (AVX2 only)")


def quantize(kind: str, weight: np.ndarray) -> np.ndarray:
    """float32 [rows, cols] -> bytes [rows, bytes of a row] in ggml's format `kind`."""
    ggml, (rows, cols) = load(), weight.shape
    block = ggml.blck_size(TYPES[kind])
    if cols % block:
        raise ConfigError(f"{kind} stores rows in blocks of {block} columns; got {cols} columns")
    weight, data = np.ascontiguousarray(weight, np.float32), np.empty((rows, ggml.row_size(TYPES[kind], cols)), np.uint8)
    ggml.quantize_chunk(TYPES[kind], weight.ctypes.data_as(POINTER(c_float)), data.ctypes.data, 0, rows, cols, None)
    return data


class Weights:
    """`copies` of a quantized weight [rows, cols], each in the first buffer type that takes its product, as in llama.cpp.

    `buffer` names that type: CPU_REPACK interleaves rows for the widest kernels, CPU keeps the file's order; with
    `plain` it is always the latter.
    """

    def __init__(self, kind: str, data: np.ndarray, cols: int, copies: int, plain: bool = False):
        self.ggml, self.rows, self.cols, self.nbytes = load(), len(data), cols, data.nbytes
        ggml = self.ggml
        for buft in ggml.buffer_types()[-1 if plain else 0:]:
            self.context = ggml.context(copies + 2)
            self.tensors = [ggml.new_tensor_2d(self.context, TYPES[kind], cols, self.rows) for _ in range(copies)]
            self.memory = ggml.backend_alloc_ctx_tensors_from_buft(self.context, buft)
            x = ggml.new_tensor_2d(self.context, FLOAT32, cols, 1)
            if self.memory and ggml.backend_supports_op(ggml.backend, ggml.mul_mat(self.context, self.tensors[0], x)):
                break
            self.close()
        else:
            raise BackendUnavailable(f"ggml has no CPU kernel for {kind} [{self.rows}, {cols}], or no memory for {copies} copies")
        self.buffer = ggml.backend_buft_name(buft).decode()
        if not why_not():           # as all weights here; nothing is written to them yet
            start, size = ggml.backend_buffer_get_base(self.memory), ggml.backend_buffer_get_size(self.memory)
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            ctypes.CDLL(None).madvise(c_void_p(first), c_size_t(start + size - first), mmap.MADV_HUGEPAGE)
        for tensor in self.tensors:
            ggml.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)

    def close(self) -> None:
        if self.memory:
            self.ggml.backend_buffer_free(self.memory)
        self.ggml.free(self.context)


class Products:
    """x [m, cols] times each copy of `weights`, or `calls` times the first: one graph, computed by `threads` threads.

    Every product writes the same output [m, rows]; ggml waits for all threads after each.
    """

    def __init__(self, weights: Weights, x: np.ndarray, threads: int, calls: int = 0):
        ggml, (m, cols) = weights.ggml, x.shape
        tensors = [weights.tensors[0]] * calls or weights.tensors
        self.weights, self.threads, self.calls = weights, threads, len(tensors)
        self.context = ggml.context(len(tensors) + 1, len(tensors) + 1)
        size = 4 * m * (cols + weights.rows) + 256
        self.memory = ggml.backend_buft_alloc_buffer(ggml.backend_cpu_buffer_type(), size)
        base = ggml.backend_buffer_get_base(self.memory)
        out = base + -(-4 * m * cols // 128) * 128
        inputs = ggml.new_tensor_2d(self.context, FLOAT32, cols, m)
        ggml.backend_tensor_alloc(self.memory, inputs, base)
        x = np.ascontiguousarray(x, np.float32)
        ggml.backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)
        self.graph = ggml.new_graph_custom(self.context, len(tensors) + 1, False)
        for tensor in tensors:
            node = ggml.mul_mat(self.context, tensor, inputs)
            ggml.backend_tensor_alloc(self.memory, node, out)
            ggml.build_forward_expand(self.graph, node)
        self.y = np.ctypeslib.as_array(ctypes.cast(out, POINTER(c_float)), (m, weights.rows))

    def __call__(self) -> np.ndarray:
        ggml = self.weights.ggml
        pool = ggml.threadpool(self.threads)
        ggml.backend_cpu_set_threadpool(ggml.backend, pool)
        ggml.backend_cpu_set_n_threads(ggml.backend, self.threads)
        status = ggml.backend_graph_compute(ggml.backend, self.graph)
        ggml.threadpool_pause(pool)     # or its threads spin on for 100 ms, at the cost of whoever is timed next
        if status:
            raise BackendUnavailable(f"ggml could not compute its products (status {status})")
        return self.y

    def close(self) -> None:
        self.weights.ggml.backend_buffer_free(self.memory)
        self.weights.ggml.free(self.context)


def libraries() -> str:
    """For a result file: the package, ggml's version and what it was compiled for."""
    ggml = load()
    return f"{ggml.package}, ggml {ggml.version}, {' '.join(ggml.instructions)}{', OpenMP' if ggml.openmp else ''}"
