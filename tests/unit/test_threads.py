"""The threads behind the kernels, PyTorch's or a pool of our own: calls at the same time, forks, the end of the process, many threads."""
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from linear_cases import Layer

from gptvq.backends import module, native
from gptvq.spec import QuantSpec

ROOT = Path(__file__).resolve().parents[2]
SPEC = QuantSpec(403, 520, 2, 2, 16, 520, 0)
PREPARE = """
import os, sys, threading, time
import torch
from linear_cases import Layer
from gptvq.backends import native
from gptvq.spec import QuantSpec
torch.set_num_threads(4)
if {own}:
    native._C.use_threads_of(0)
layer, x = Layer(QuantSpec(403, 520, 2, 2, 16, 520, 0)), torch.randn(9, 520)
want = layer.run(x)

def right(threads=4, calls=20):
    return all(torch.equal(layer.run(x, threads=threads), want) for _ in range(calls))
"""


@pytest.fixture(params=["torch", "own"])
def python(request):
    """f(code) -> output of a program that starts with PREPARE; fails where it does not end by itself."""
    return lambda code: output(PREPARE.format(own=request.param == "own") + textwrap.dedent(code))


def output(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.fixture(params=["torch", "own"])
def either(request):
    """PyTorch's threads or our own in this process."""
    if request.param == "own":
        native._C.use_threads_of(0)
    yield
    native._C.use_threads_of(module._parallel_for())


@pytest.mark.usefixtures("either")
def test_calls_from_many_threads_at_once():
    """One of them gets the threads, the others compute alone; every one of them is right."""
    layers = [Layer(SPEC, seed=i) for i in range(8)]
    inputs = [torch.randn(1 + i % 5, SPEC.cols) for i in range(8)]
    want = [layer.run(x) for layer, x in zip(layers, inputs)]
    wrong, start = [], threading.Barrier(8)

    def call(i):
        start.wait()
        for n in range(50):
            if not torch.equal(layers[i].run(inputs[i], threads=1 + (i + n) % 6), want[i]):
                wrong.append((i, n))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@pytest.mark.usefixtures("either")
def test_one_layer_from_many_threads():
    layer, x = Layer(SPEC), torch.randn(3, SPEC.cols)
    want, wrong = layer.run(x), []

    def call():
        wrong.extend(n for n in range(50) if not torch.equal(layer.run(x, threads=3), want))

    threads = [threading.Thread(target=call) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@pytest.mark.usefixtures("either")
def test_sleeping_threads_wake_up():
    """Pauses longer and shorter than the threads' patience, and numbers of threads that grow and shrink."""
    layer, x = Layer(SPEC), torch.randn(9, SPEC.cols)
    want, pause = layer.run(x), threading.Event()
    for n in range(200):
        pause.wait((0, 20e-6, 30e-6, 40e-6, 1e-3)[n % 5])
        assert torch.equal(layer.run(x, threads=1 + n % 7), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork(python):
    """Before and after the parent's threads exist, from several threads of the child, and in a grandchild."""
    assert python("""
        def child(*, deeper):
            caller = threading.Thread(target=lambda: results.append(right()))
            results = []
            caller.start()
            results.append(right())
            caller.join()
            if deeper:
                results.append(wait(os.fork() or os._exit(not child(deeper=False))) == 0)
            return all(results)

        def wait(pid):
            return os.waitpid(pid, 0)[1]

        for started in range(2):
            print(wait(os.fork() or os._exit(not child(deeper=True))))
            assert right()
    """) == ["0", "0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_in_the_middle_of_calls(python):
    """The pool is busy for good in the child's copy of the memory, which the child must not look at."""
    assert python("""
        stop = threading.Event()

        def work():
            while not stop.is_set():
                layer.run(x, threads=4)

        busy = [threading.Thread(target=work) for _ in range(2)]
        [t.start() for t in busy]
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if right(calls=3) else 1)
            print(os.waitpid(pid, 0)[1])
        stop.set()
        [t.join() for t in busy]
    """) == ["0"] * 20


def test_process_ends_while_threads_work(python):
    """The threads meet a dead interpreter when they come back (and must not call torch, which does not survive that)."""
    assert python("""
        y = torch.empty(9, 403)

        def work(call=layer.handle.run, arguments=(x.data_ptr(), 0, 9, y.data_ptr(), 0, 4)):
            while True:
                call(*arguments)

        [threading.Thread(target=work, daemon=True).start() for _ in range(3)]
        time.sleep(0.2)
        print("end")
    """) == ["end"]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
def test_many_threads_of_our_own():
    """64 are given where there is work for them; the number is bounded, and they are the same ones in later calls."""
    counts = [int(n) for n in output(PREPARE.format(own=True) + textwrap.dedent("""
        layer, x = Layer(QuantSpec(20000, 64, 2, 2, 16, 64, 0)), torch.randn(9, 64)
        want = layer.run(x)

        def count():
            return len(os.listdir("/proc/self/task"))

        before = count()
        for threads in (64, 64, 64, 10**6, 10**6):
            assert torch.equal(layer.run(x, threads=threads), want)
            print(count() - before)
    """))]
    assert 0 < counts[0] < 64 and counts[:3] == counts[:1] * 3
    assert counts[3] <= 255 and counts[3] == counts[4]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
def test_the_threads_of_torch_are_taken():
    counts = [int(n) for n in output(PREPARE.format(own=False) + textwrap.dedent("""
        def count():
            return len(os.listdir("/proc/self/task"))

        torch.randn(1000, 1000).exp_()
        before = count()
        assert before >= 4 and right()
        print(count() - before)
        native._C.use_threads_of(0)
        assert right()
        print(count() - before)
    """))]
    assert counts == [0, 3]


PARALLEL_FOR = """
import ctypes

BODY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
calls, late = [], [0.0]

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, BODY, ctypes.c_void_p)
def parallel_for(begin, end, grain, body, context):
    calls.append((begin, end, grain))
    if fails:
        return 1
    body(begin, end, context)
    time.sleep(late[0])
    return 0

fails = False
native._C.use_threads_of(ctypes.cast(parallel_for, ctypes.c_void_p).value)
"""


def test_after_a_thread_came_late_brief_calls_compute_alone_for_a_while():
    """20 ms of waiting are worth 400 ms, in which calls of few tokens wait for no others, and those of many do."""
    assert output(PREPARE.format(own=False) + PARALLEL_FOR + textwrap.dedent("""
        few, want_few = x[:8], layer.run(x[:8])
        late[0] = 0.02
        layer.run(few, threads=4)
        print(len(calls), calls[0])
        began, late[0] = time.monotonic(), 0.0
        while time.monotonic() < began + 0.2:
            assert torch.equal(layer.run(few, threads=4), want_few)
        print(len(calls))
        assert right(calls=2)
        print(len(calls))
        time.sleep(0.4)
        layer.run(few, threads=4)
        print(len(calls))
    """)) == ["1", "(0,", "4,", "1)", "1", "3", "4"]


def test_without_threads_to_be_had_the_caller_computes_alone():
    assert output(PREPARE.format(own=False) + PARALLEL_FOR + textwrap.dedent("""
        fails = True
        assert right(calls=5)
        print(len(calls))
    """)) == ["5"]
