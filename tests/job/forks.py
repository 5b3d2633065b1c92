"""Many short runs of quantize() in processes of their own: a server that has imported everything forks one child for each.

As a program: reads one JSON request per line, answers each with one line.  `Forks` is its client.  A child may be told to die
by SIGKILL after some seconds, at its n-th step on the disk (halfway through the first write to a file, or before the call), or at
its n-th exchange with other processes.  With `ranks` there are several children for one run, of which number `dies` (0) does so.
"""
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("fsync", "replace", "unlink", "rmdir", "mkdir", "truncate")


class Forks:
    def __init__(self, **environment):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **environment})

    def start(self, **request):
        self.server.stdin.write(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in request.items()}) + "\n")
        self.server.stdin.flush()

    def result(self):
        """{"signal", "error", "steps", "exchanges", "peak", "seconds"} and those of "others"; of one that was killed the first and last."""
        return json.loads(self.server.stdout.readline())

    def run(self, **request):
        self.start(**request)
        return self.result()

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=30)


def steps_until(fatal):
    """Counts the steps on the disk, and dies at number `fatal`."""
    count, last = [0], [None]

    def step(name):
        count[0] += 1
        if count[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(name, call):
        def wrapper(*args, **kwargs):
            last[0] = None
            step(name)
            return call(*args, **kwargs)
        return wrapper

    def write(fd, data, call=os.write):
        if last[0] != fd:                   # the first write to a file stands for all of them
            last[0] = fd
            if count[0] + 1 == fatal:
                call(fd, bytes(data)[: len(data) // 2])
            step("write")
        return call(fd, data)

    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))
    os.write = write
    return count


def exchanges_until(fatal):
    """Counts what this process gathers from others and sends them, and dies at number `fatal`."""
    import torch.distributed as dist

    count = [0]

    def counted(call):
        def wrapper(*args):
            count[0] += 1
            if count[0] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)
        return wrapper

    for name in ("all_gather", "all_to_all_single", "send"):
        setattr(dist, name, counted(getattr(dist, name)))
    return count


def job(request):
    import torch
    from job.tiny_models import build, preset

    import gptvq.head
    import gptvq.stream

    ids = torch.randint(0, 256, (request.get("samples", 2), 32), generator=torch.Generator().manual_seed(5))
    model = request["model"] if os.path.sep in request["model"] else build(request["model"])
    if "poisoned" in request:                               # number of a sample whose hidden states are no numbers
        ids[ids == 255] = 0
        ids[request["poisoned"], 7] = 255
        model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.masked_fill((args[0] == 255)[..., None], float("nan")))
    if "memory" in request:                                 # as much as is said to be free
        gptvq.stream.available_memory = lambda: request["memory"]
    gptvq.head._LEAST_PART = request.get("least_part", gptvq.head._LEAST_PART)
    config = preset(**request.get("config", {}))
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **request.get("recipe", {})))
    gptvq.quantize(model, request["out"], config, calibration=ids, **request.get("arguments", {}))


def child(request, answer):
    from gptvq import GptvqError
    from gptvq.ranks import torchrun

    error, report = None, os.fdopen(answer, "w")
    mortal = request["rank"] == request.get("dies", 0)
    count, exchanges = steps_until(request.get("fatal") if mortal else None), exchanges_until(request.get("exchange") if mortal else None)
    try:
        if "file_limit" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
        with torchrun("cpu"):
            job(request)
    except GptvqError as caught:
        error = f"{type(caught).__name__}: {caught}"
    with report:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        json.dump({"error": error, "steps": count[0], "exchanges": exchanges[0], "peak": peak}, report)


def fork(request, port):
    """(pid, where its answer comes from)."""
    get, put = os.pipe()
    pid = os.fork()
    if pid == 0:
        if request.get("ranks", 1) > 1:                     # what torchrun tells its processes
            os.environ.update(RANK=str(request["rank"]), WORLD_SIZE=str(request["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            child(request, put)
        finally:
            os._exit(0)
    os.close(put)
    return pid, get


def result_of(pid, get, began):
    with os.fdopen(get) as answer:
        data = answer.read()
    _, status = os.waitpid(pid, 0)
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "seconds": time.monotonic() - began,
            **(json.loads(data) if data else {})}


def serve():
    from job.tiny_models import build
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())    # its own is shared with the forks: one killed while holding it would stop all later ones
    with tempfile.TemporaryDirectory() as folder:       # once before the forks, which then find everything imported and set up
        job({"model": "llama", "out": os.path.join(folder, "out")})
        build().save_pretrained(os.path.join(folder, "dense"))
        job({"model": os.path.join(folder, "dense"), "out": os.path.join(folder, "again")})
    for line in sys.stdin:
        request, began = json.loads(line), time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        forks = [fork({**request, "rank": rank}, port) for rank in range(request.get("ranks", 1))]
        if "kill_after" in request:
            time.sleep(request["kill_after"])
            os.kill(forks[request.get("dies", 0)][0], signal.SIGKILL)
        first, *others = [result_of(*found, began) for found in forks]
        print(json.dumps({**first, "others": others}), flush=True)


if __name__ == "__main__":
    serve()
