"""The emulator notices mistakes: kernels with one each (bugs.cu), in every order of threads."""
import ctypes

import numpy as np
import pytest
from emulated_cuda import ORDERS

X = (np.arange(128) % 7).astype(np.float32)
SUMS = X.reshape(2, 64).sum(1)


@pytest.fixture(scope="module")
def run(emulator):
    """run(bug, order) -> (y [2], what the emulator says)."""
    function = ctypes.CDLL(emulator.__file__).gptvq_bug
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]

    def call(bug, order):
        emulator.set_order(order, 3)
        y = np.full(2, 12345, np.float32)
        said = function(bug.encode(), X.ctypes.data, y.ctypes.data).decode()
        return y, said

    yield call
    emulator.set_order("forward")


@pytest.mark.parametrize("order", ORDERS)
def test_right_kernel_runs(run, order):
    y, said = run("none", order)
    assert said == "" and (y == SUMS).all()


@pytest.mark.parametrize("bug, says", [
    ("barrier in branch", "return|wait at bugs.cu:"),
    ("early return", r"23 thread\(s\) returned, 41 wait at bugs.cu:"),
    ("lane outside mask", r"not in its mask \(bugs.cu:|lane \d+ is not in the mask \(bugs.cu:"),
    ("source outside mask", r"__shfl_sync: lane 20 is not in the mask \(bugs.cu:"),
    ("two collectives", r"meet in __a.._sync \(bugs.cu:\d+\) and in __a.._sync"),
    ("dynamic overrun", "past the end of dynamic shared memory"),
    ("static overrun", r"past the end of s \(bugs.cu:"),
    ("misaligned", r"__ldg: misaligned address \(bugs.cu:"),
    ("too many threads", "1056 threads in a block"),
    ("too much shared memory", "233472 bytes of dynamic shared memory"),
])
@pytest.mark.parametrize("order", ORDERS)
def test_error_is_named(run, bug, says, order):
    import re
    _, said = run(bug, order)
    assert re.search(says, said), said


@pytest.mark.parametrize("bug, caught", [("no wait", 4), ("unwritten", 4), ("no barrier", 2)])
def test_poison_comes_through(run, bug, caught):
    """What was not written before it is read is NaN: without a wait or a write always, without a barrier in the orders that show it."""
    wrong = []
    for order in ORDERS:
        y, said = run(bug, order)
        assert said == ""
        wrong.append(bool(np.isnan(y).any()))
    assert sum(wrong) >= caught, wrong


def test_race_depends_on_the_order(run):
    results = {run("race", order)[0].tobytes() for order in ORDERS}
    assert len(results) > 1


def test_random_order_depends_on_the_seed_only(emulator, run):
    function = ctypes.CDLL(emulator.__file__).gptvq_bug
    results = {}
    for seed in (1, 2, 3, 1, 2, 3):
        emulator.set_order("random", seed)
        y = np.empty(2, np.float32)
        function(b"race", ctypes.c_void_p(X.ctypes.data), ctypes.c_void_p(y.ctypes.data))
        results.setdefault(seed, set()).add(y.tobytes())
    assert all(len(r) == 1 for r in results.values())


def test_unknown_order_is_refused(emulator):
    with pytest.raises(ValueError, match="order: got sideways, need forward"):
        emulator.set_order("sideways")
