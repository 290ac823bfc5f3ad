"""How near are images to the images that they should be? PSNR, SSIM and LPIPS, by torchmetrics."""

import torch
from torch import Tensor

PSNR_CAP = 100.0
"""dB that a pair counts at most. Equal images have infinity by the formula: a mean with it says
nothing of the other pairs, and JSON has none. One value off by one is 83 dB at 32 x 32 x 3."""
SSIM_WINDOW = 11  # Wang et al. 2004, section III-C


class Pairs:
    """Streamed means over pairs of images; peak value 1."""

    def __init__(self, device: torch.device, lpips: bool = False) -> None:
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

        # per image, then averaged: the mean of decibels is not the decibel of a mean
        self.metrics = {
            "psnr": PeakSignalNoiseRatio(data_range=1.0, reduction="none", dim=(1, 2, 3)),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none"),
        }
        if lpips:
            self.metrics["lpips"] = _lpips()
        for metric in self.metrics.values():
            metric.to(device)
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        self.sums = dict.fromkeys(self.metrics, 0.0)
        self.count = 0

    def add(self, made_NCHW: Tensor, goal_NCHW: Tensor) -> None:
        """Take in pairs of uint8 images (N, C, H, W); too small ones for SSIM go without it."""
        if min(made_NCHW.shape[2:]) < SSIM_WINDOW:
            self.metrics.pop("ssim", None)
            self.sums.pop("ssim", None)
        made_NCHW, goal_NCHW = made_NCHW.float() / 255, goal_NCHW.float() / 255
        for name, metric in self.metrics.items():
            if name == "lpips":
                shape = (-1, 3, -1, -1)
                value = metric(made_NCHW.expand(shape), goal_NCHW.expand(shape)) * len(made_NCHW)
            else:
                value_N = metric(made_NCHW, goal_NCHW)
                value = (value_N.clamp(max=PSNR_CAP) if name == "psnr" else value_N).sum()
            self.sums[name] += float(value)
            metric.reset()
        self.count += len(made_NCHW)


def _lpips() -> torch.nn.Module:
    """LPIPS with AlexNet (Zhang et al. 2018). Raises ValueError where it cannot be fetched."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    except OSError as error:
        raise ValueError(
            f"--metrics.lpips: AlexNet's weights cannot be fetched ({error}); put torchvision's "
            f"file into {torch.hub.get_dir()}/checkpoints, or leave --metrics.lpips out"
        ) from None
