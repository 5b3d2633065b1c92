"""gptvq: GPTVQ vector quantization of language models, stored packed at 2 to 4 bits per weight.

The names below are the public interface; each is imported on first use.  Importing the package registers the checkpoint
format with transformers, and the packed linear with peft, without importing either.
"""
import importlib
import importlib.abc
import importlib.util
import sys
import types

from .checkpoint import VERSION as __version__

_HOME = {"VQConfig": "config", "QuantSpec": "spec", "Recipe": "config", "quantize": "quantize", "quantize_weight": "solver",
         "load": "hf", "GptvqConfig": "on_load", "verify": "verify", "VQLinear": "linear", "VQWeight": "weight", "Report": "report",
         "GptvqError": "errors", "ConfigError": "errors", "FormatError": "errors", "NumericalError": "errors",
         "ResumeMismatch": "errors", "BackendUnavailable": "errors",
         "Chat": "chat", "write_page": "page", "export_dense": "export", "perplexity": "evaluate", "agreement": "evaluate",
         "run_tasks": "tasks", "plan": "plan", "tune_folder": "tune", "diagnose": "doctor"}
__all__ = ["__version__", *_HOME]


class _Package(types.ModuleType):
    """`gptvq.quantize`, `verify` and `plan` are the functions: importing the submodules of those names must not put them in their place."""

    def __setattr__(self, name, value):
        if name in ("quantize", "verify", "plan") and isinstance(value, types.ModuleType):
            value = getattr(value, name)
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


class _WhenLoaded(importlib.abc.MetaPathFinder):
    """Imports a module of ours right after `target` of another package, which it extends: importing that here costs seconds."""

    def __init__(self, target: str, ours: str):
        self.target, self.ours = target, f"{__name__}.{ours}"

    def find_spec(self, name, path=None, target=None):
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            importlib.import_module(self.ours)

        spec.loader.exec_module = exec_module
        return spec


for _target, _ours in (("transformers.quantizers.auto", "hf"), ("peft.tuners.lora.model", "peft")):
    if _target in sys.modules:
        importlib.import_module(f"{__name__}.{_ours}")
    else:
        sys.meta_path.insert(0, _WhenLoaded(_target, _ours))
