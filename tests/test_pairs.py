"""How near images are to what they should be: PSNR, SSIM, and LPIPS on a stand-in of AlexNet."""

import math

import pytest
import torch
import torchvision

from engine.metrics.pairs import Pairs

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
