"""python -m bench.triton_resources: registers, shared memory and spills of every Triton kernel, compiled ahead of time; no GPU needed."""
from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gptvq.backends import triton, triton_launch
from gptvq.config import PRESETS, VQConfig
from gptvq.errors import BackendUnavailable
from gptvq.weight import DTYPES

from . import runner
from .layers import describe_format

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
FORMATS = ["1d-2.125", "1d-3.125", "1d-4.125", "2d-2.25", "2d-3.125", "2d-4.125", "4d-2.25", "4d-3.125"]
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
         torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8"}
EXAMPLE = """example:
  python -m bench.triton_resources --json bench/results/triton-resources.json

The launchers run on tensors without memory, of a 4096 x 4096 layer; every distinct kernel they would launch is compiled, with the
default configuration of the architecture.  TRITON_INTERPRET must not be set."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if triton_launch.interpreted() or not triton_launch.version():
        raise BackendUnavailable("nothing can be compiled: " + ("unset TRITON_INTERPRET, under which Triton's compiler is off"
                                 if triton_launch.version() else triton_launch.why_not(torch.device("cuda"))))
    runner.check_names("--presets", args.presets, PRESETS)
    runner.check_names("--arch", args.arch, ARCHITECTURES)
    results = runner.Results("triton_resources", argv, args.json, {"triton": triton_launch.version(), "shape": list(args.shape)})
    for arch in args.arch:
        for launched in launches(args, arch):
            results.add([row(launched, arch)])
            runner.log(show(results.rows[-1:]).splitlines()[-1])
    print(show(results.rows))


def parser():
    p = runner.parser("triton_resources", "Resources of the Triton kernels.", EXAMPLE)
    p.add_argument("--presets", type=runner.names, default=FORMATS + [f"{name}-s64" for name in FORMATS], metavar="A,B",
                   help="default: every format, without and with block scales")
    p.add_argument("--arch", type=runner.names, default=list(ARCHITECTURES), metavar="A,B", help=f"default {','.join(ARCHITECTURES)}")
    p.add_argument("--dtypes", type=runner.names, default=["float16", "bfloat16", "float32"], metavar="A,B", help="of the activations")
    p.add_argument("--m", type=runner.numbers, default=[1, 2, 4, 8, 16, 32, 64, 512], metavar="N,M", help="tokens; above 256 dequantize")
    p.add_argument("--shape", type=lambda text: runner.shapes(text)[0], default=(4096, 4096), metavar="RxC", help="default 4096x4096")
    p.add_argument("--only", choices=("linear", "quantize"), help="kernels on packed weights, or those that make them")
    return p


# ---- what would be launched
def launches(args, arch: str) -> list[dict]:
    """The distinct launches of all operators on a layer of each preset."""
    found: dict[tuple, dict] = {}
    about: dict = {}

    def record(name, kernel, grid, arguments, constants, config):
        key = name, *((n, t.dtype if isinstance(t, torch.Tensor) else _kind(t)) for n, t in arguments.items()), *map(str, constants.items())
        found.setdefault(key, {"name": name, "kernel": kernel, "arguments": arguments, "constants": constants, "config": config, **about})

    start, architecture = triton_launch.start, triton_launch.architecture
    triton_launch.start, triton_launch.architecture = record, lambda device: arch
    try:
        for preset in args.presets:
            spec = VQConfig.preset(preset).spec(*args.shape)
            about = {"preset": preset, "format": describe_format(spec)}
            if args.only != "quantize":
                multiply(spec, args)
            if args.only != "linear":
                quantize(spec)
    finally:
        triton_launch.start, triton_launch.architecture = start, architecture
    return list(found.values())


def multiply(spec, args) -> None:
    made = {name: torch.empty(shape, dtype=DTYPES[kind], device="meta") for name, (shape, kind) in spec.buffer_shapes().items()}
    table = torch.empty(spec.scale_blocks, 16, device="meta") if spec.scale_block else None
    layer = triton.prepare_linear(made["idx"], made["cb"], made["gs"], made.get("sc"), table, None, spec)
    for dtype in args.dtypes:
        for m in args.m:
            layer(torch.empty(m, spec.cols, dtype=getattr(torch, dtype), device="meta"), "a16")


def quantize(spec) -> None:
    """Every operator of quantization that has a kernel for the format once, on blocks of 128 columns."""
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    d, k = spec.dim, spec.codewords
    n, points = 128 // d, spec.group_rows * spec.group_cols // d
    centroids, strip = empty(spec.row_groups, spec.strips, k, d), empty(n, dtype=torch.long)
    scale, index = empty(spec.rows, n) if spec.scale_block else None, empty(spec.rows, n, dtype=torch.uint8)
    triton.fit(empty(spec.row_groups, points, d), empty(spec.group_cols // d, d, d), empty(spec.row_groups, points),
               empty(8, spec.row_groups, k, d), ((10, 1), (40, 1)))
    if spec.signs:
        return                                          # the rest is PyTorch's
    triton.column_block(empty(spec.rows, 128), empty(128, 128), empty(n, d, d), centroids, strip, scale, spec.group_rows)
    triton.descent_block(empty(spec.rows, 128), empty(128, 128), index, centroids, strip, scale, spec.group_rows)
    triton.assign(empty(spec.rows, d), empty(d, d), centroids[:, 0], spec.group_rows)
    triton.decode(index, centroids, strip, scale, spec.group_rows)
    for values in {d, d * d}:
        triton.collect(index, empty(spec.rows, n, values), strip, spec.group_rows, (spec.row_groups, spec.strips, k))


# ---- compiling
def _kind(value) -> str:
    """How Triton specializes an argument that is no tensor."""
    if value is None or value == 1:
        return "constexpr"
    return ("i32" if value < 1 << 31 else "i64") + (" by 16" if value % 16 == 0 else "")


def row(launched: dict, arch: str) -> dict:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel, arguments, constants, config = (launched[name] for name in ("kernel", "arguments", "constants", "config"))
    kinds = {n: f"*{TYPES[t.dtype]}" if isinstance(t, torch.Tensor) else _kind(t) for n, t in arguments.items()}
    fixed = {**constants, **{n: arguments[n] for n, kind in kinds.items() if kind == "constexpr"}}
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, {n: "constexpr" if n in fixed else kinds[n].removesuffix(" by 16") for n in kernel.arg_names},
                       {at[n]: value for n, value in fixed.items()},
                       {at[n]: [["tt.divisibility", 16]] for n, kind in kinds.items() if kind[0] == "*" or kind.endswith("by 16")})
    began = time.perf_counter()
    compiled = compile(source, target=GPUTarget("cuda", ARCHITECTURES[arch], 32),
                       options={"num_warps": config.num_warps, "num_stages": config.num_stages})
    operation, _, variant = launched["name"].partition(" ")
    x = arguments.get("x", arguments.get("out"))
    return {"operation": operation, "variant": variant, "method": "triton", "preset": launched["preset"], "format": launched["format"],
            "dtype": str(x.dtype)[6:] if operation in ("vq_gemv", "vq_gemm", "dequantize") else "float32", "device": arch,
            "threads": 32 * config.num_warps, "config": str(config), "compile_seconds": time.perf_counter() - began,
            "shared_bytes": compiled.metadata.shared, **resources(compiled.asm["cubin"])}


def resources(cubin: bytes) -> dict:
    """Registers, stack and spills, the widest loads, and which matrix instructions a compiled kernel has."""
    from triton.backends import nvidia
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
                       for option in ("--dump-resource-usage", "-sass"))
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(found["REG"]), "stack_bytes": int(found["STACK"]), "local_bytes": int(found["LOCAL"]),
            "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", code)),
            "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S", code)),
            "wide_loads": len(re.findall(r"\bLDG\S*\.128|\bLDGSTS\S*\.128", code)),
            "matrix": ", ".join(sorted(set(re.findall(r"\b(?:HGMMA|HMMA)[.\w]*", code))))}


def show(rows: list[dict]) -> str:
    return runner.table(rows, {
        "kernel": lambda r: f"{r['operation']} {r['variant']}".strip(), "format": lambda r: r["format"], "dtype": lambda r: r["dtype"],
        "arch": lambda r: r["device"], "configuration": lambda r: r["config"], "registers": lambda r: r["registers"],
        "shared, bytes": lambda r: r["shared_bytes"], "spills": lambda r: r["stack_bytes"] + r["local_bytes"] + r["spill_instructions"],
        "instructions": lambda r: r["instructions"], "wide loads": lambda r: r["wide_loads"], "matrix": lambda r: r["matrix"] or "-"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
