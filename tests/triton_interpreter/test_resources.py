"""Every Triton kernel compiles ahead of time for two architectures, with no GPU: no spills, wide loads, tensor cores."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_runs import check_file

from gptvq.backends import triton_launch
from gptvq.triton_kernels import configs

ROOT = Path(__file__).parents[2]
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10}       # bytes that a program may have
QUANTIZE = "1d-3.125,2d-2.25-s64,2d-3.125,4d-2.25-s64"
RUNS = {
    "sm_90": (["--only", "linear", "--presets", "1d-2.125,1d-3.125,1d-4.125,2d-2.25,2d-3.125-s64,2d-4.125,4d-2.25,4d-3.125", "--m",
               "1,8,64", "--dtypes", "float16"],
              ["--only", "linear", "--presets", "2d-2.25-s64", "--m", "1,2,4,16,32,64,512", "--dtypes", "float32"],
              ["--only", "linear", "--presets", "4d-2.25-s64", "--m", "1,16,32", "--dtypes", "bfloat16"],
              ["--only", "quantize", "--presets", QUANTIZE]),
    "sm_80": (["--only", "linear", "--presets", "2d-2.25-s64,1d-3.125", "--m", "1,2,4,8,16,32,64,512", "--dtypes", "float16"],
              ["--only", "quantize", "--presets", QUANTIZE]),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{architecture: rows}, compiled by two processes at a time, where Triton's interpreter is off."""
    if why := triton_launch.version() == "" and "triton is not installed":
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("resources")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache"),
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    rows, waiting = {arch: [] for arch in RUNS}, [(arch, options) for arch, runs in RUNS.items() for options in runs]

    def start(arch, options):
        path = folder / f"{len(waiting)}.json"
        command = [sys.executable, "-m", "bench.triton_resources", "--arch", arch, *options, "--json", path]
        return arch, path, subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.PIPE)

    while waiting:
        for arch, path, process in [start(*waiting.pop()) for _ in range(min(2, len(waiting)))]:
            errors = process.communicate()[1]
            assert process.returncode == 0, errors[-3000:]
            rows[arch] += check_file(path, "triton_resources")
    return rows


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", RUNS)
def test_resources(compiled, arch):
    for row in compiled[arch]:
        assert row["device"] == arch and row["stack_bytes"] == row["local_bytes"] == row["spill_instructions"] == 0, row
        assert 0 < row["registers"] <= 255 and row["shared_bytes"] <= SHARED[arch], row
        if row["operation"] == "vq_gemv" and row["variant"].endswith("M=1"):
            assert row["wide_loads"] >= 1, row              # 16 bytes of indices a thread
        if row["operation"] == "vq_gemv":
            assert row["shared_bytes"] <= 2048, row         # only the last sum goes through it: loads and look-ups share a layout
        if row["operation"] == "vq_gemm":
            assert "MMA" in row["matrix"], row
        if row["operation"] == "vq_gemm" and row["variant"] == "M=64" and arch == "sm_90":
            assert row["matrix"].startswith("HGMMA"), row   # Hopper's own instruction


@pytest.mark.slow
def test_every_default_configuration_is_compiled(compiled):
    names = {f"{row['operation']} {row['variant']}".strip() for rows in compiled.values() for row in rows}
    assert names == set(configs.TABLE)


def test_it_says_why_it_cannot(monkeypatch, capsys):
    from bench import runner, triton_resources
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_launch, "version", lambda: "3.8.0")
    assert runner.run(triton_resources.main, []) == 1 and "unset TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setattr(triton_launch, "version", lambda: "")
    assert runner.run(triton_resources.main, []) == 1 and "triton is not installed" in capsys.readouterr().err
