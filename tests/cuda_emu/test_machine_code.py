"""No kernel spills registers or uses a stack, and none takes more registers than its table says."""
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from machine_code import ARCHITECTURES, ROOT, compiled, instructions, resources

FILES = sorted(p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.stem != "runtime")
#: most registers of a thread by file and kernel; a block's threads times these, rounded up to 8, must fit into 65,536
MOST_REGISTERS = {
    "packing": {"pack_kernel": 32, "unpack_kernel": 32, "dequantize_kernel": 48},
    "centroids": {"decode_kernel": 24, "collect_kernel": 48},
    "column_block": {"column_kernel": 160},
    "em": {"em_kernel": 128, "em_1d_kernel": 96},
    "linear_half": {"linear_half_inputs_kernel": 32, "linear_half_kernel": 128},
    "linear": {"linear_exact_kernel": 40, "linear_sum_kernel": 32},
    "linear_1d": {"linear_inputs_kernel": 32, "linear_tile_kernel": 64, "linear_tile_tokens_kernel": 128},
    "linear_2d": {"linear_inputs_kernel": 32, "linear_tile_kernel": 64, "linear_tile_tokens_kernel": 128},
    "linear_k256": {"linear_inputs_kernel": 32, "linear_group_kernel": 64, "linear_group_tokens_kernel": 128},
}


@pytest.fixture(scope="module")
def all_compiled():
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(lambda job: compiled(*job), [(name, architecture) for name in FILES for architecture in ARCHITECTURES]))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", FILES)
def test_registers(all_compiled, name, architecture):
    found = resources(name, architecture)
    assert found
    table = MOST_REGISTERS.get(name, {})
    for kernel, used in found.items():
        most = table.get(kernel.split("<")[0])
        assert most is not None, f"{kernel} is new: give it a line in MOST_REGISTERS['{name}']"
        assert used["registers"] <= most and used["stack"] == used["spills"] == 0, (kernel, used)
    assert set(table) == {kernel.split("<")[0] for kernel in found}


def test_every_kernel_file_is_built():
    listed = (ROOT / "CMakeLists.txt").read_text()
    assert not [name for name in FILES if f"csrc/cuda/{name}.cu" not in listed]


def loops_of(sass):
    """The instructions of each loop, from a jump's target to the jump."""
    body = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    back = [(int(re.search(r"0x([0-9a-f]+)", text)[1], 16), at) for at, text in body if re.search(r"\bBRA\b.*0x", text)]
    return [[text for at, text in body if first <= at <= last] for first, last in back if first < last]


#: instructions of a warp for one centroid and one point: D fused steps, 1.5 for the minimum, c^T M c shared by the unit's points
E_STEP = {"em_kernel<2, 4>": 5.5, "em_kernel<2, 8>": 4.6, "em_kernel<4, 8>": 8.0}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_of_the_e_step(architecture):
    found = instructions("em", architecture)
    for kernel, most in E_STEP.items():
        points = int(kernel[-2])
        e_step, = (loop for loop in loops_of(found[kernel]) if not any("LDG" in text for text in loop)
                   and [sum(name in text for text in loop) for name in ("FMNMX", "FSETP")] == [3 * points, points])
        assert len(e_step) / (4 * points) <= most, (kernel, len(e_step))
        assert not re.search(r"ATOMS\.CAS", found[kernel])              # the sums' additions are the hardware's own


#: instructions of a warp for one centroid and one row, whose codebook is its neighbour's: 4 fused steps, 3 for the minimum, and what two
#: rows and two centroids share.  With signs 16 codes: 2 products, 4 fused steps, 8 sums and 8 differences, 7 minima instead of the steps.
SCAN = {"column_kernel<4, false, false>": 10.0, "column_kernel<4, false, true>": 36.0}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_of_a_choice(architecture):
    found = instructions("column_block", architecture)
    for kernel, most in SCAN.items():
        scan = min((loop for loop in loops_of(found[kernel]) if sum("FSETP" in text for text in loop) == 4), key=len)
        assert len(scan) / 4 <= most, (kernel, len(scan))
