"""The way of a release: source distribution -> wheel -> fresh environment -> use from another folder."""
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import gptvq

pytestmark = pytest.mark.timeout(900)          # a whole build, on busy cores
ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".pytest_cache", ".hypothesis",
                                    "demo-out", "results")

USE = """
import sys, torch, gptvq, gptvq._C, gptvq.triton_kernels
from gptvq.backends import native
from gptvq.spec import QuantSpec
assert "site-packages" in gptvq.__file__ and gptvq.__file__.startswith(sys.prefix), gptvq.__file__
spec = QuantSpec(33, 70, 2, 3, 16, 32)
codes = torch.arange(33 * 35).remainder(64).view(33, 35).to(torch.uint8)
idx = native.pack_codes(codes, spec)
assert torch.equal(native.unpack_codes(idx, spec), codes)
cb = torch.arange(64).sub(32).to(torch.int8).expand(3, 3, 2, 64).contiguous()
out = native.dequantize(idx, cb, torch.full((3, 3), 0.5).bfloat16(), None, None, spec, torch.float32)
assert torch.equal(out, (codes.float() - 32).mul(0.5).repeat_interleave(2, 1))
assert not gptvq._C.built_with_cuda and "without CUDA" in gptvq._C.cuda_info()["why"]
print("works", gptvq.__version__)
"""


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def environment():
    """No path into the source tree, no CUDA compiler to wait for."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GPTVQ_"))}
    return {**clean, "GPTVQ_CUDA": "OFF", "PYTHONSAFEPATH": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, environment):
    """Built from a copy, which is as bare as a fresh clone."""
    tree = tmp_path_factory.mktemp("source") / "gptvq"
    shutil.copytree(ROOT, tree, ignore=NOT_SOURCE)
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=tree, env=environment)
    return next(out.glob("gptvq-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory, environment):
    for module in ("pybind11", "wheel"):
        pytest.importorskip(module, reason=f"building a wheel without isolation needs {module}")
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, sdist, env=environment)
    return next(out.glob("gptvq-*.whl"))


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sdist.name == f"gptvq-{gptvq.__version__}.tar.gz"
    for needed in ("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "MANIFEST.in", "LICENSE", "README.md", "csrc/bindings.cpp",
                   "csrc/cpu/layout.h", "csrc/cuda/runtime.cu", "gptvq/__init__.py", "gptvq/backends/native.py",
                   "triton_kernels/__init__.py", "tests/conftest.py", ".ci/run"):
        assert needed in names
    sources = {str(p.relative_to(ROOT)) for folder in ("csrc", "gptvq", "triton_kernels", "tests") for p in (ROOT / folder).rglob("*")
               if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}}
    assert sources <= names
    assert not [n for n in names if n.endswith((".so", ".pyc")) or n.startswith((".venv", "build"))]


@pytest.mark.slow
def test_wheel_holds_the_package_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"gptvq", f"gptvq-{gptvq.__version__}.dist-info"}
    assert "gptvq/triton_kernels/__init__.py" in names and "gptvq/backends/reference.py" in names
    assert "gptvq/_C" + sysconfig.get_config_var("EXT_SUFFIX") in names
    torch_requirement = re.search(r"^Requires-Dist: torch\b(.*)$", metadata, re.MULTILINE)[1]
    assert "<2.14" in torch_requirement and ">=2.11" in torch_requirement


@pytest.mark.slow
def test_fresh_environment(wheel, tmp_path, environment):
    """torch and the other requirements come from this environment; gptvq can only come from the wheel."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", env=environment)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, env=environment)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=environment).strip())
    (site / "outer.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(python, "-c", USE, cwd=elsewhere, env=environment).split() == ["works", gptvq.__version__]
    assert (python.parent / "gptvq").exists()


def test_triton_kernels_has_one_name(tmp_path):
    """Its folder lies at the top of the source tree, where another package's import name would find it."""
    import gptvq.triton_kernels
    assert gptvq.triton_kernels.__name__ == "gptvq.triton_kernels"
    bare = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"})
    assert bare.returncode == 1
    assert "ImportError" in bare.stderr and "import gptvq.triton_kernels instead" in bare.stderr


def test_the_source_tree_says_that_it_is_not_built(tmp_path, environment):
    """Code that runs in it takes the gptvq there, not the one installed."""
    shutil.copytree(ROOT, tmp_path / "tree", ignore=NOT_SOURCE)
    code = ("import runpy, sys; sys.modules['gptvq._C'] = None; "       # which an editable install would find elsewhere
            "sys.argv = ['gemv', '--shapes', '32x32']; runpy.run_module('bench.gemv', run_name='__main__')")
    bench = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "tree", capture_output=True, text=True,
                           env={k: v for k, v in environment.items() if k != "PYTHONSAFEPATH"})
    assert bench.returncode == 1 and "bench: error: there are no kernels to measure: the compiled module gptvq._C cannot be imported" in bench.stderr
    assert f"{tmp_path / 'tree'} is the source tree: run `pip install -e .` there, or work in another folder" in bench.stderr


@pytest.fixture
def setup_py(monkeypatch):
    """The names of setup.py, in an environment without anything to build with."""
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CMAKE_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    return runpy.run_path(str(ROOT / "setup.py"))


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("name, folder", [("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")])
def test_build_tools_are_those_of_the_build(setup_py, name, folder, tmp_path, monkeypatch):
    """pip's own of an isolated build, then PATH; an old one beside Python comes last."""
    tool = setup_py["tool"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf"{name} not found; install it with `pip install '{'cmake>=3.24' if name == 'cmake' else 'ninja'}'`"):
        tool(name)
    assert program(tmp_path / "beside" / name) == tool(name)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert program(tmp_path / "path" / name) == tool(name)
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{folder: str(tmp_path / "package")}))
    assert tool(name) == str(tmp_path / "path" / name)
    assert program(tmp_path / "package" / name) == tool(name)


def test_which_cuda_compiler(setup_py, tmp_path, monkeypatch):
    """The one that is named, or nvcc of the toolkit that is; and a build folder that another one was used in is left."""
    find, other = setup_py["cuda_compiler"], setup_py["other_compiler"]
    places = {name: program(tmp_path / name / "bin" / "nvcc") for name in ("path", "old", "home", "named", "given")}
    for variable, value, name in [("PATH", tmp_path / "path" / "bin", "path"), ("CUDA_PATH", tmp_path / "old", "old"),
                                  ("CUDA_HOME", tmp_path / "home", "home"), ("CUDACXX", places["named"], "named"),
                                  ("CMAKE_ARGS", f"-DX=1 -DCMAKE_CUDA_COMPILER={places['given']}", "given")]:
        monkeypatch.setenv(variable, str(value))
        assert find() == places[name]
    cache = f"X:STRING=1\nCMAKE_CUDA_COMPILER:FILEPATH={places['home']}\n"
    assert not other(cache, places["home"]) and not other(cache, places["home"] + " -O1") and not other("X:STRING=1\n", places["old"])
    assert other(cache, places["old"]) and other(cache, "") and other(cache, str(tmp_path / "gone" / "nvcc"))


def test_failed_build_names_the_way_out(tmp_path, environment):
    """A compiler that does not work ends in one sentence about it, not in a traceback."""
    shutil.copytree(ROOT, tmp_path / "tree", ignore=NOT_SOURCE)
    built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext"], cwd=tmp_path / "tree", capture_output=True, text=True,
                           env={**environment, "CXX": "no-such-compiler"})
    assert built.returncode != 0 and "Traceback" not in built.stderr
    assert "gptvq: compiling gptvq._C failed" in built.stderr and "GPTVQ_CUDA=OFF" in built.stderr and "CMake >= 3.24" in built.stderr
