"""Which pipeline `auto` takes, what it says, and that a resumed run keeps it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines import open as opening
from pipelines import resident
from pipelines.datasets import find
from pipelines.open import choose
from pipelines.settings import Data
from pipelines.sources import ArraySet
from tests.batches import CPU, clock_of, opened, some
from tests.forked import train
from tests.runs import QUICK, run_folder, toy

CUDA = torch.device("cuda", 0)


@pytest.fixture
def no_room(monkeypatch):
    """A machine whose memory holds no image."""
    monkeypatch.setattr(opening, "_available_memory", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))


def test_what_fits_is_resident(data, monkeypatch):
    assert choose(find(data), data, CPU) == ("resident", "chosen by auto: 0.0 MB packed fits")
    monkeypatch.setattr(opening, "_available_memory", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
    assert choose(find(data), data, CUDA)[0] == "resident"  # on the device


def test_what_does_not_fit_is_decoded_on_a_gpu_or_by_workers(data, no_room):
    dataset = find(data)
    name, why = choose(dataset, data, CUDA)
    assert name == "dali" and "not resident: 0.0 GB packed is over 50%" in why
    assert "not ffcv: no .beton is prepared" in why
    name, why = choose(dataset, data, CPU)
    assert name == "torchvision" and "not dali: no GPU to decode on" in why


def test_a_prepared_beton_is_taken(data, no_room):
    dataset = find(data)
    from pipelines.beton import beton_path, open_beton

    open_beton(dataset, data, beton_path(dataset, data), lambda _: None, False)
    for device in (CPU, CUDA):
        assert choose(dataset, data, device)[0] == "ffcv"


def test_what_is_not_installed_is_passed_over_or_named(data, no_room, monkeypatch):
    monkeypatch.setattr(opening.dali, "missing", lambda: "--data.pipeline dali needs it")
    name, why = choose(find(data), data, CUDA)
    assert name == "torchvision" and "not dali: --data.pipeline dali needs it" in why
    with pytest.raises(ValueError, match=r"--data\.pipeline dali needs it"):
        choose(find(data), replace(data, pipeline="dali"), CUDA)


def test_dali_decodes_files_alone():
    pixels_NHWC = np.zeros((4, 8, 8, 3), np.uint8)
    dataset = ArraySet("digits", "train", find(Data(resolution=8)).fit, images_NHWC=pixels_NHWC)
    with pytest.raises(ValueError, match="decodes image files, and digits has none: use resident"):
        choose(dataset, Data(pipeline="dali"), CPU)


def test_the_choice_is_kept_while_it_is_possible(data, monkeypatch):
    dataset = find(data)
    assert choose(dataset, data, CPU, "torchvision") == ("torchvision", "as when the run began")
    assert opened(data, clock_of(data)).name == "resident"
    monkeypatch.setattr(opening.dali, "missing", lambda: "gone")
    assert choose(dataset, data, CPU, "dali") == ("resident", "chosen by auto: 0.0 MB packed fits")


def test_a_resumed_run_keeps_its_pipeline(tmp_path):
    flags = [*toy("dcgan_mnist")[1], *QUICK, "--run-name", "it", "--runs", str(tmp_path / "runs")]
    blocked = tmp_path / "blocked"
    blocked.write_text("no folder")
    first = train("dcgan_mnist", *flags, "--steps", "2", "--data.cache", str(blocked))
    assert "pipeline: torchvision: not resident: cannot keep a packed cache" in first
    again = train("dcgan_mnist", *flags, "--steps", "4", "--data.cache", str(tmp_path / "cache"))
    assert "pipeline: torchvision: as when the run began" in again
    about = json.loads((tmp_path / "runs" / "dcgan_mnist" / "it" / "recipe.json").read_text())
    assert about["resolved"]["pipeline"][0] == "torchvision"
    assert run_folder(tmp_path / "runs", "dcgan_mnist").name == "it"


def test_synthetic_is_one_batch_that_moves_along(data):
    one, two = some(replace(data, pipeline="synthetic"), 2)
    assert torch.equal(one.images_NCHW, two.images_NCHW)
    assert two.position_N.tolist() == [*range(8, 16)] and one.labels_N.shape == (8,)


def test_what_goes_on_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    assert resident.fits(250, CUDA)[0] and not resident.fits(251, CUDA)[0]
    assert "25% of the 0.0 GB free on cuda:0" in resident.fits(251, CUDA)[1]
