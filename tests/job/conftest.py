import shutil

import pytest
import torch


@pytest.fixture
def ids():
    """Calibration tokens of the tiny models."""
    return torch.randint(0, 256, (8, 32))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint with every kind of tensor, in three files; not to be changed."""
    from bench.mutations import make

    folder = tmp_path_factory.mktemp("sound") / "out"
    make(folder)
    return folder


@pytest.fixture
def copy(sound, tmp_path):
    """One of it to be damaged."""
    shutil.copytree(sound, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def forks():
    """A process that runs jobs in forks of itself, which are cheap to kill."""
    from job.forks import Forks

    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny dense model on the disk."""
    from job.tiny_models import build

    path = tmp_path_factory.mktemp("models") / "dense"
    build().save_pretrained(path)
    return path
