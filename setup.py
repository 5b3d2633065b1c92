"""Metadata of gptvq, and its build: setuptools drives CMake, which compiles gptvq._C.

Environment: GPTVQ_CUDA = AUTO (default: where nvcc is found) | ON | OFF; CUDACXX, CUDA_HOME, CUDA_PATH: whose nvcc;
GPTVQ_CUDA_ARCHS, as CMAKE_CUDA_ARCHITECTURES;
GPTVQ_BUILD_TYPE, as CMAKE_BUILD_TYPE; CMAKE_ARGS, appended; MAX_JOBS.
"""
import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^VERSION = "(.+?)"', (ROOT / "gptvq/checkpoint.py").read_text(encoding="utf-8"), re.MULTILINE)[1]


TOOLS = {"cmake": ("cmake>=3.24", "CMAKE_BIN_DIR"), "ninja": ("ninja", "BIN_DIR")}


def tool(name: str) -> str:
    """Path of a build tool: that of the package this Python imports, which an isolated build has of its own; else on PATH; else
    beside this Python."""
    requirement, folder = TOOLS[name]
    places = [None, str(Path(sys.executable).parent)]
    with contextlib.suppress(ImportError, AttributeError):
        places.insert(0, str(getattr(importlib.import_module(name), folder)))
    path = next((found for found in (shutil.which(name, path=place) for place in places) if found), None)
    if path is None:
        raise SystemExit(f"gptvq: {name} not found; install it with `pip install '{requirement}'` or build without --no-build-isolation")
    return path


def cuda_compiler() -> str:
    """The one named by CMAKE_ARGS or CUDACXX, or nvcc of CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda; "" where there is none."""
    given = re.search(r"-DCMAKE_CUDA_COMPILER(?::\w+)?=(\S+)", os.environ.get("CMAKE_ARGS", ""))
    if given or os.environ.get("CUDACXX"):
        return given[1] if given else os.environ["CUDACXX"]
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next((found for found in (shutil.which("nvcc", path=place) for place in [*homes, None, "/usr/local/cuda/bin"]) if found), "")


def other_compiler(cache: str, compiler: str) -> bool:
    """Whether the text of a CMakeCache.txt holds another CUDA compiler, which CMake would keep to."""
    known = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
    found = shutil.which(shlex.split(compiler)[0]) if compiler else None
    return known is not None and (found is None or os.path.abspath(found) != os.path.abspath(known[1]))


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        # A fixed folder, not self.build_temp, which is a new one for every `pip install -e`: rebuilds are incremental.
        build, cuda = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}", os.environ.get("GPTVQ_CUDA") or "AUTO"
        compiler = cuda_compiler() if cuda != "OFF" else ""
        if (build / "CMakeCache.txt").exists():
            cache = (build / "CMakeCache.txt").read_text()
            moved = f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache         # the source tree was copied or moved
            if moved or cuda != "OFF" and other_compiler(cache, compiler):
                shutil.rmtree(build)
        args = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "CMAKE_MAKE_PROGRAM": tool("ninja"),    # always: a cached path may lie in a build environment pip has deleted
            "CMAKE_BUILD_TYPE": os.environ.get("GPTVQ_BUILD_TYPE") or "Release",
            "Python_EXECUTABLE": sys.executable,
            "GPTVQ_CUDA": cuda,
            "GPTVQ_CUDA_ARCHS": os.environ.get("GPTVQ_CUDA_ARCHS") or "80-real;90a-real;90-virtual",
        }
        cmake, jobs = tool("cmake"), os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        environment = {**os.environ, **({"CUDACXX": compiler} if compiler else {})}
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{key}={value}" for key, value in args.items()),
                            *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True, env=environment)
            subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True, env=environment)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"gptvq: compiling gptvq._C failed (exit code {error.returncode}, messages above); it needs CMake >= 3.24 and "
                             "a C++17 compiler, and if CUDA is at fault, GPTVQ_CUDA=OFF builds without it") from None


setup(
    name="gptvq",
    version=VERSION,
    description="GPTVQ: vector quantization of language models at 2 to 4 bits per weight",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["gptvq", "gptvq.*"]), "gptvq.triton_kernels"],
    # triton_kernels/ is a folder at the top of the source tree only: another package has that import name.
    package_dir={"gptvq": "gptvq", "gptvq.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("gptvq._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # torch is bounded above: a plain `torch` would replace an installed build by the newest one with all of CUDA.
    install_requires=["torch>=2.11,<2.14", "transformers>=5.17,<6", "numpy>=1.26", "safetensors>=0.8", "accelerate>=1.1",
                      "gguf>=0.13", "rich>=13"],
    extras_require={
        "test": ["pytest>=8", "pytest-timeout", "hypothesis>=6.100", "peft>=0.21", "setuptools>=70", "wheel", "cmake>=3.24", "ninja",
                 "pybind11>=2.13",
                 "triton>=3.6,<3.9; platform_system == 'Linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"],
        "datasets": ["datasets>=2.19"],
        "peft": ["peft>=0.21"],
        "eval": ["lm-eval>=0.4.8"],
        # llama-cpp-python compiles for the processor at hand (10 minutes): the baselines of bench.gemv and bench.decode.
        "bench": ["matplotlib>=3.8", "llama-cpp-python>=0.3.36"],
    },
    entry_points={"console_scripts": ["gptvq = gptvq.cli:main"], "vllm.general_plugins": ["gptvq = gptvq.vllm:register"]},
    zip_safe=False,
)
