"""How near images are to what they should be: PSNR, SSIM, and LPIPS on a stand-in of AlexNet."""

import math

import pytest
import torch
import torchvision
from PIL import Image

from engine.metrics.folders import Folders
from engine.metrics.pairs import PSNR_CAP, Pairs
from engine.settings import Metrics

CPU = torch.device("cpu")


def noise(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 246, (6, 3, 64, 64), dtype=torch.uint8, generator=generator)


def means(made: torch.Tensor, goal: torch.Tensor, batch: int = 6, lpips: bool = False) -> dict:
    pairs = Pairs(CPU, lpips)
    for a, b in zip(made.split(batch), goal.split(batch), strict=True):
        pairs.add(a, b)
    return {name: total / pairs.count for name, total in pairs.sums.items()}


def test_psnr_of_a_constant_error_is_the_formula():
    found = means(noise(0) + 10, noise(0))
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)


def test_psnr_of_equal_images_is_the_cap_and_spoils_no_mean():
    assert means(noise(0), noise(0))["psnr"] == PSNR_CAP == 100
    half = torch.cat([noise(0)[:3], noise(0)[3:] + 10])
    expected = (PSNR_CAP + 20 * math.log10(255 / 10)) / 2
    assert means(half, noise(0))["psnr"] == pytest.approx(expected, abs=1e-3)


def test_the_smallest_difference_stays_under_the_cap():
    near = noise(0)
    near[:, 0, 0, 0] += 1
    expected = 20 * math.log10(255) + 10 * math.log10(3 * 64 * 64)
    assert means(near, noise(0))["psnr"] == pytest.approx(expected, abs=1e-2)
    assert expected < PSNR_CAP


@pytest.fixture
def folders(tmp_path) -> Folders:
    """Two folders of the same three images."""
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
        for i, image_CHW in enumerate(noise(0)[:3]):
            Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    return Folders(tmp_path / "real", tmp_path / "fake", None, None)


def test_a_folder_against_its_copy_has_finite_figures_and_says_the_cap(folders):
    found = folders.evaluate_pairs(Metrics(), CPU)
    assert found.figures == pytest.approx({"psnr": 100, "ssim": 1})
    assert "psnr at most 100 dB" in found.protocol.extractor
    assert all(value != "" for value in found.protocol.values().values())


def test_a_missing_partner_is_named_with_the_folder_that_lacks_it(folders):
    (folders.fake / "1.png").unlink()
    with pytest.raises(ValueError, match=r"the first is 1, which is missing in --fake .*fake$"):
        folders.evaluate_pairs(Metrics(), CPU)
    (folders.real / "1.png").rename(folders.fake / "0a.png")
    with pytest.raises(ValueError, match=r"the first is 0a, which is missing in --real .*real$"):
        folders.evaluate_pairs(Metrics(), CPU)


def test_folders_without_classes_are_told_of_the_classifier_of_a_dataset(folders):
    with pytest.raises(ValueError, match=r"--real .*: give --data\.name DATASET"):
        folders.evaluate(Metrics(extractor="classifier"), CPU, print)


def test_ssim_is_one_for_equal_images_and_near_nothing_for_noise():
    assert means(noise(0), noise(0))["ssim"] == pytest.approx(1)
    assert abs(means(noise(0), noise(1))["ssim"]) < 0.1


def test_images_smaller_than_the_window_of_ssim_have_a_psnr_alone():
    assert list(means(noise(0)[..., :8, :8], noise(1)[..., :8, :8])) == ["psnr"]


def test_batches_do_not_change_the_means():
    whole, parts = means(noise(0), noise(1)), means(noise(0), noise(1), batch=4)
    assert whole == pytest.approx(parts)


def test_lpips_is_nothing_for_equal_images(monkeypatch):
    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).state_dict()
    weights = torchvision.models.AlexNet_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *args, **options: state)
    assert means(noise(0), noise(0), lpips=True)["lpips"] == pytest.approx(0, abs=1e-6)
    apart = means(noise(0), noise(1), lpips=True)["lpips"]
    assert apart > 1e-3
    assert means(noise(0), noise(1), batch=2, lpips=True)["lpips"] == pytest.approx(apart)


def test_lpips_that_cannot_be_fetched_is_one_clear_error(monkeypatch):
    def fail(*args, **options):
        raise OSError("no route to host")

    weights = torchvision.models.AlexNet_Weights
    monkeypatch.setattr(weights, "get_state_dict", fail)
    with pytest.raises(ValueError, match=r"--metrics\.lpips: AlexNet.*no route to host"):
        Pairs(CPU, lpips=True)
