"""What tests of several files are given: settings, and folders of images or of checkpoints."""

import os
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from engine.checkpoint import save
from engine.metrics import classifier
from engine.session import Session
from pipelines.settings import Data
from tests.batches import folder_of_22
from tests.checkpoints import FACTS, advance, started


@pytest.fixture(scope="session", autouse=True)
def _shared_settings(tmp_path_factory):
    torch.set_num_threads(1)  # OpenMP threads spin on busy cores: ten times slower
    os.environ["SADDLE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # of all tests


@pytest.fixture(scope="session")
def weights(_shared_settings) -> str:
    """The metrics' classifier of the digits, as a file of weights for any images."""
    classifier.open_classifier(Data(name="digits"), torch.device("cpu"), print)
    return str(next(Data().cache_folder().glob("classifier-digits-*.safetensors")))


@pytest.fixture
def data(tmp_path) -> Data:
    """A folder of 22 PNGs in two classes, at batch 8, flipped."""
    return folder_of_22(tmp_path)


@pytest.fixture(scope="module")
def trained() -> Session:
    """A session after two iterations, never trained on."""
    return advance(started(), 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def three(folder, trained) -> list[Path]:
    """Checkpoints of 8, 16 and 24 images, oldest first, and nothing else."""
    live, paths = trained, []
    for images in (8, 16, 24):
        live.clock.seek(images)
        paths.append(save(live, folder, FACTS))
    live.clock.seek(16)
    return paths
