"""llama.cpp's own decoding of a GGUF file, through the package llama-cpp-python.

On processors with AMX it dies of a segmentation fault where GCC 12 compiled it: that compiler leaves most of the tiles' configuration unwritten before
_tile_loadconfig.  CC=clang CXX=clang++ before pip install helps.
"""
from __future__ import annotations

import ctypes
import importlib.util
import time
from pathlib import Path

import numpy as np

from gptvq.errors import BackendUnavailable

from . import ggml

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q2_K": 10}
TENSOR_TYPES = {"F16": 1}
_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


def load():
    """The module of its C functions; BackendUnavailable where the package is missing or broken."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise BackendUnavailable("llama-cpp-python is not installed: CMAKE_ARGS=-DGGML_OPENMP=OFF pip install llama-cpp-python "
                                 "(compiles, 10 minutes)")
    try:
        from llama_cpp import llama_cpp
    except Exception as error:              # what a broken build or a missing dependency raises is not documented
        raise BackendUnavailable(f"llama-cpp-python does not load: {error}") from error
    ggml.load()
    llama_cpp._lib.llama_attach_threadpool.argtypes = [ctypes.c_void_p] * 3
    llama_cpp.llama_log_set(_QUIET, None)
    return llama_cpp


def requantize(source: Path, out: Path, file_type: str, embedding: str | None = None) -> None:
    """Writes the model of the GGUF file `source` with its linears in the format `file_type`.

    embedding: of TENSOR_TYPES, for the embedding and the head; None is as llama.cpp chooses.
    """
    api = load()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = FILE_TYPES[file_type], True
    if embedding:
        params.token_embedding_type = params.output_tensor_type = TENSOR_TYPES[embedding]
    if api.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise BackendUnavailable(f"llama.cpp cannot write {source.name} as {file_type}")


class LlamaModel:
    """A GGUF file opened by llama.cpp; linears are repacked for this processor as it does by default."""

    def __init__(self, path: Path, context: int = 512):
        self.api = api = load()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise BackendUnavailable(f"llama.cpp cannot open {path.name}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch = context, context
        self.context = api.llama_init_from_model(self.model, params)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def decode(self, prompt: list[int], new_tokens: int, threads: int) -> tuple[list[int], float]:
        """(greedy continuation, tokens per second of all but its first token), as gptvq.evaluate.decode."""
        api, pool = self.api, ggml.load().threadpool(threads)
        api.llama_set_n_threads(self.context, threads, threads)
        api._lib.llama_attach_threadpool(self.context, pool, pool)
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        found = [self._next(prompt)]
        began = time.perf_counter()
        while len(found) < new_tokens:
            found.append(self._next(found[-1:]))
        seconds = time.perf_counter() - began
        ggml.load().threadpool_pause(pool)
        return found, (new_tokens - 1) / seconds

    def _next(self, ids: list[int]) -> int:
        api, tokens = self.api, (self.api.llama_token * len(ids))(*ids)        # the batch does not keep them alive
        if status := api.llama_decode(self.context, api.llama_batch_get_one(tokens, len(ids))):
            raise BackendUnavailable(f"llama.cpp could not decode (status {status})")
        return int(np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, -1), (self.vocabulary,)).argmax())

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
