"""gptvq: GPTVQ vector quantization of language models, stored packed at 2 to 4 bits per weight.

The names below are the public interface; each is imported on first use.  Importing the package registers the checkpoint
format with transformers without importing it.
"""
import importlib
import importlib.abc
import importlib.util
import sys
import types

from .checkpoint import VERSION as __version__

_HOME = {"VQConfig": "config", "QuantSpec": "spec", "Recipe": "config", "quantize": "quantize", "quantize_weight": "solver",
         "load": "hf", "VQLinear": "linear", "VQWeight": "weight", "Report": "report", "GptvqError": "errors",
         "ConfigError": "errors", "FormatError": "errors", "NumericalError": "errors", "ResumeMismatch": "errors",
         "BackendUnavailable": "errors",
         "Chat": "chat", "write_page": "page", "export_dense": "export", "perplexity": "evaluate", "agreement": "evaluate", "run_tasks": "tasks"}
__all__ = ["__version__", *_HOME]


class _Package(types.ModuleType):
    """`gptvq.quantize` is the function: importing the submodule of that name must not put itself in its place."""

    def __setattr__(self, name, value):
        if name == "quantize" and isinstance(value, types.ModuleType):
            value = value.quantize
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)


class _WhenTransformersLoads(importlib.abc.MetaPathFinder):
    """Imports gptvq.hf, which registers the format, right after transformers' quantizers: importing those here costs seconds."""

    target = "transformers.quantizers.auto"

    def find_spec(self, name, path=None, target=None):
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            importlib.import_module(f"{__name__}.hf")

        spec.loader.exec_module = exec_module
        return spec


if _WhenTransformersLoads.target in sys.modules:
    importlib.import_module(f"{__name__}.hf")
else:
    sys.meta_path.insert(0, _WhenTransformersLoads())
