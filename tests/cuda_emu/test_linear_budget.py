"""Instructions per weight of y = W x for one token, against what leaves an H100's memory the slowest part.

At 3.0 TB/s and 1.7 GHz, 132 multiprocessors have for a weight of 2.125 bits 2.54 issue slots, 1.27 operations of the ALU pipe and 0.64
lane accesses to shared memory (or shuffles); in proportion for more bits.  How fast a pipe is, is assumed: no GPU was at hand.

4D K256 with signs takes for a vector of four weights 3 instructions to look it up, 5 to change its signs and 5 as its share of what a turn
of the loop does besides: 13, or 3.2 a weight.  Of those the ALU's are 2, 3 (a byte's sign eight times, and two of logic) and 1.  With block
scales the share is 1.6 more, and all of it 3.6 a weight.
"""
import collections
import re

import pytest
from machine_code import instructions

from gptvq.config import PRESETS, VQConfig

BUDGET = {"issue": 2.54 / 2.125, "alu": 1.27 / 2.125, "shared": 0.64 / 2.125}       # per bit of a weight
ALU = set("LOP3 SHF PRMT SEL ISETP IADD3 LEA PLOP3 FSETP FMNMX IMNMX VIMNMX VIMNMX3 VIADDMNMX BMSK SGXT IABS FSEL R2P P2R I2FP VIADD MOV "
          "CS2R FLO".split())
SHARED = set("LDS STS SHFL ATOMS LDSM".split())
WEIGHTS = 16 * 256 / 32             # of a lane in a turn of the loop
KERNELS = {"1d": "linear_1d", "2d": "linear_2d", "4d": "linear_k256"}


def loop(sass):
    """Instructions of the innermost loop that multiplies, one turn of which decodes a chunk of 16 x 256 weights."""
    found = [(int(at, 16), re.sub(r"^@!?U?P\w+\s+", "", text.strip())) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    bodies = []
    for at, text in found:
        target = re.match(r"BRA.*?(?<![\w.])0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            body = [t for a, t in found if int(target[1], 16) <= a <= at and not t.startswith("NOP")]
            if sum("IMMA" in t for t in body) == 8:
                bodies.append(body)
    return min(bodies, key=len)


def per_weight(body):
    """{"issue", "alu", "shared"}; a group's table is filled once per turn, each thread of 256 an entry."""
    counts = collections.Counter(t.split()[0].split(".")[0] for t in body)
    wide = sum(3 for t in body if t.startswith(("STS.128", "LDS.128")))         # passes beyond the first
    return {"issue": len(body) / WEIGHTS, "alu": sum(counts[k] for k in ALU) / WEIGHTS,
            "shared": (sum(counts[k] for k in SHARED) + wide) / WEIGHTS}


def kernel_of(spec):
    name = "linear_k256" if spec.codewords == 256 else KERNELS[f"{spec.dim}d"]
    kind = "group" if spec.codewords == 256 else "tile"
    return name, f"linear_{kind}_kernel<LinearFormat<{spec.code_bits}, {spec.dim}>, {spec.scale_block or 256}>"


@pytest.mark.slow
def test_instructions_of_a_weight(capsys):
    """Of all presets; the table is shown always."""
    table, over = [], []
    for preset in PRESETS:
        spec = VQConfig.preset(preset).spec(4096, 4096)
        name, kernel = kernel_of(spec)
        body = loop(instructions(name, "sm_90a")[kernel])
        used, budget = per_weight(body), {kind: per_bit * spec.bits_per_value for kind, per_bit in BUDGET.items()}
        shares = "  ".join(f"{kind} {used[kind]:5.2f} of {budget[kind]:4.2f} ({used[kind] / budget[kind]:4.0%})" for kind in BUDGET)
        table.append(f"{preset:14} {spec.bits_per_value:5.3f} bits  {shares}")
        over += [table[-1] for kind in BUDGET if used[kind] > budget[kind]]
        assert not [t for t in body if t.startswith(("LDL", "STL"))], kernel
    with capsys.disabled():
        print("\ninstructions per weight, sm_90a\n" + "\n".join(table))
    assert not over
