"""Rules of the house that a compiler would not notice: who imports whom, how long a file may be, what an import may do."""
import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gptvq"
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))

# A module imports only modules of earlier lines; those of the job line, the outside world among them, also each other.
LAYERS = [
    {"errors"},
    {"spec"},
    {"config"},
    {"triton_kernels"},
    {"backends"},
    {"ops"},
    {"ranks"},
    {"hessian", "scaling", "codebook"},
    {"weight"},
    {"problem"},
    {"refine"},
    {"solver"},
    {"unpacked"},
    {"linear"},
    {"embedding", "learning", "dense"},
    {"experts", "model", "drift", "stream", "calibration", "journal", "checkpoint", "tensorfile", "verify", "storage", "machine", "job",
     "redo", "parts", "plan", "sums", "mixed", "report", "evaluate", "hf", "peft", "tune", "vllm", "export", "doctor", "bands", "code_use",
     "plots", "page_style", "page", "chat", "ahead", "kernel_speed", "tasks", "shard", "token_weights", "on_load",
     "gguf_file", "head", "check", "distill", "shortcuts", "large_pages"},
    {"quantize"},
    {"cli_job", "cli_plan", "cli_streams", "cli_use", "completion", "cli", "demo", "__main__"},
    {"__init__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
JOB = RANK["model"]
EXTRA = {("hf", "quantize"), ("on_load", "quantize")}
LINE_CEILINGS = {"gptvq": 300, "csrc": 500, "triton_kernels": 500, "tests": 300, "bench": 300}
LINE_EXCEPTIONS: dict[str, int] = {}
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def repository_files():
    """Files of the project: those git tracks or would track; in an unpacked source distribution, all."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        skipped = {".venv", "build", "dist", "__pycache__", ".git", ".pytest_cache", ".hypothesis"}
        paths = [p for p in ROOT.rglob("*") if not skipped & set(p.relative_to(ROOT).parts) and p.suffix != ".so"]
    return sorted(p for p in paths if p.is_file())


def module_name(path):
    """gptvq/backends/native.py -> backends; gptvq/weight.py -> weight."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk_code(node):
    """ast.walk without what only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield from walk_code(child)


def imported(path, tree):
    """Top-level names of the gptvq modules that a file imports, at any depth of the code."""
    depth = len(path.relative_to(PACKAGE).parts)            # dots that lead up to the package itself
    for node in walk_code(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == depth or (node.level == 0 and module == "gptvq"):
                yield from [module.split(".")[0]] if module and node.level else [alias.name for alias in node.names]
            elif node.level == 0 and module.startswith("gptvq."):
                yield module.split(".")[1]
            elif 0 < node.level < depth:
                yield module_name(path)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("gptvq."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    name = module_name(path)
    assert name in RANK, f"gptvq/{name} is new: give it a line in LAYERS"
    for target in set(imported(path, ast.parse(path.read_text()))) - {name, "_C"}:
        if target not in RANK:                               # a public name, from the package itself
            target = "__init__"
        if RANK[name] >= RANK["cli"] and target == "__init__":
            continue                                         # the command line uses the public interface
        allowed = RANK[target] < RANK[name] or RANK[target] == RANK[name] >= JOB or (name, target) in EXTRA
        assert allowed, f"gptvq/{name} may not import {target}"


def test_one_place_imports_the_compiled_module():
    users = [p.name for p in MODULES if "_C" in imported(p, ast.parse(p.read_text()))]
    assert users == ["module.py"]


@pytest.mark.parametrize("folder", LINE_CEILINGS)
def test_files_stay_readable(folder):
    too_long = {}
    for path in repository_files():
        relative = path.relative_to(ROOT)
        if relative.parts[0] == folder and path.suffix in SOURCES:
            lines = len(path.read_text().splitlines())
            if lines > LINE_EXCEPTIONS.get(str(relative), LINE_CEILINGS[folder]):
                too_long[str(relative)] = lines
    assert not too_long


PROBE = """
import contextlib, io, json, os, random, sys, time
import torch
state, environment = torch.get_rng_state(), dict(os.environ)
threads, precision, rand = torch.get_num_threads(), torch.get_float32_matmul_precision(), random.getstate()
out, start = io.StringIO(), time.process_time()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    import gptvq
seconds = time.process_time() - start
print(json.dumps({
    "seconds": seconds, "output": out.getvalue(), "file": gptvq.__file__,
    "heavy": [m for m in ("transformers", "triton", "datasets", "rich", "gguf", "accelerate") if m in sys.modules],
    "cuda": torch.cuda.is_initialized(), "environment": dict(os.environ) == environment,
    "state": torch.equal(torch.get_rng_state(), state) and random.getstate() == rand
             and (threads, precision) == (torch.get_num_threads(), torch.get_float32_matmul_precision())}))
"""


def test_import_is_inert_and_quick():
    runs = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
        assert run.stderr == ""
        runs.append(json.loads(run.stdout))
    assert all(r["heavy"] == [] and r["output"] == "" and not r["cuda"] and r["environment"] and r["state"] for r in runs), runs
    assert statistics.median(r["seconds"] for r in runs) < 0.3


PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_pickle_and_no_code_from_files(path):
    """What a user downloads is data: nothing in the package may execute it."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not PICKLING & {alias.name.split(".")[0] for alias in node.names}, where
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in PICKLING, where
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.save", "torch.load", "eval", "exec", "compile", "__import__"}, f"{where}: {called}"
            for keyword in node.keywords:
                if keyword.arg in {"trust_remote_code", "allow_pickle"}:
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False, f"{where}: {keyword.arg}"


def test_library_does_not_print():
    for path in MODULES:
        if module_name(path) not in {"cli", "cli_plan", "cli_use", "demo", "__main__"}:
            calls = [n.lineno for n in ast.walk(ast.parse(path.read_text()))
                     if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
            assert not calls, f"{path.name}: print in lines {calls}"


def test_no_file_names_a_place_of_one_machine():
    places = re.compile("|".join(["/" + place + r"\b" for place in (r"work/\w+", r"tmp/w", r"root/\.?\w+", r"opt/\w+", r"home/\w+", r"Users/\w+")]))
    found = []
    for path in repository_files():
        if path.is_symlink() or path.suffix in {".png", ".safetensors", ".gguf", ".so"}:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            match = places.search(line)
            if match and (match.start() == 0 or not (line[match.start() - 1].isalnum() or line[match.start() - 1] in "._-")):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found


def test_version_is_stated_once():
    import gptvq
    stated = [str(p.relative_to(ROOT)) for p in repository_files()
              if p.suffix in {".py", ".toml", ".txt", ".cpp"} and f'"{gptvq.__version__}"' in p.read_text(errors="replace")]
    assert stated == ["gptvq/checkpoint.py"]
