"""Autoencoder whose code is a map of whole numbers: VQ-VAE.

van den Oord, Vinyals and Kavukcuoglu 2017, "Neural discrete representation learning",
https://arxiv.org/abs/1711.00937, section 4.1: strided 4x4 convolutions, then residual blocks (ReLU,
3x3, ReLU, 1x1), all of one width; the decoder is the mirror. What the text leaves open: a ReLU
between the strided convolutions and one after the residual blocks, and a 1x1 convolution to the
length of a code's vector and one from it.

Shapes: N batch, C channels, H height, W width, h and w those of the code map, K codes of the
codebook, D length of a code's vector, M = N h w vectors of a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.networks.spec import ImageSpec, Network


class Residual(nn.Module):
    """x + a 3x3 and a 1x1 convolution of it, each after a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Of the input's shape."""
        return x_NCHW + self.path(x_NCHW)


class Codebook(nn.Module):
    """K vectors, which no optimizer moves (`engine.codebook` does).

    vectors_KD: e, float32. sizes_K, sums_KD: N and m of the paper's appendix A.1, float32, moving
    averages of how many vectors a code stood for in a batch, and of the sum of these.
    """

    vectors_KD: Tensor
    sizes_K: Tensor
    sums_KD: Tensor

    def __init__(self, codes: int, length: int) -> None:
        super().__init__()
        vectors_KD = torch.empty(codes, length).uniform_(-1 / codes, 1 / codes)
        self.register_buffer("vectors_KD", vectors_KD)
        self.register_buffer("sizes_K", torch.ones(codes))
        self.register_buffer("sums_KD", vectors_KD.clone())

    def nearest(self, z_NDhw: Tensor) -> Tensor:
        """The code of the least ||z - e||, equation 1, int64 (N, h, w); in float32, since 16 bits
        cannot tell neighbours apart."""
        with torch.autocast("cuda" if z_NDhw.is_cuda else "cpu", enabled=False):
            z_MD = z_NDhw.float().movedim(1, -1).flatten(0, 2)
            # ||z||^2, which all codes have in common, is left out
            square_K = self.vectors_KD.square().sum(1)
            distance_MK = torch.addmm(square_K, z_MD, self.vectors_KD.T, alpha=-2)
        return distance_MK.argmin(1).view(len(z_NDhw), *z_NDhw.shape[2:])

    def look_up(self, code_Nhw: Tensor) -> Tensor:
        """The codes' vectors, float32 (N, D, h, w)."""
        return self.vectors_KD[code_Nhw].movedim(-1, 1)


class Autoencoder(nn.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, encoder: nn.Module, codebook: Codebook, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.codebook, self.decoder = encoder, codebook, decoder

    def vectors(self, images_NCHW: Tensor) -> Tensor:
        """z_e, the encoder's output before quantisation, float32 (N, D, h, w)."""
        return self.encoder(images_NCHW).float()

    def encode(self, images_NCHW: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] to codes, int64 (N, h, w) in [0, K)."""
        return self.codebook.nearest(self.vectors(images_NCHW))

    def decode(self, code_Nhw: Tensor) -> Tensor:
        """Codes, int64 (N, h, w), to images (N, C, H, W), float32 in [-1, 1]."""
        return self.decoder(self.codebook.look_up(code_Nhw)).float().clamp(-1, 1)


@dataclass(frozen=True)
class VectorQuantised(Network):
    """Sizes of the autoencoder."""

    width: int = 256
    """Channels of all layers."""
    halvings: int = 2
    """Strided convolutions, each of which halves the map: 2 make 16x16 codes of 64x64 pixels."""
    blocks: int = 2
    """Residual blocks of the encoder, and of the decoder."""
    codes: int = 512
    """Entries of the codebook (K)."""
    length: int = 64
    """Length of an entry (D)."""

    def side(self, resolution: int) -> int:
        """h and w for images of so many pixels a side; raises ValueError where they do not fit."""
        side, left = divmod(resolution, 2**self.halvings)
        if left or not side:
            raise ValueError(
                f"--data.resolution {resolution} cannot be halved {self.halvings} times: give a "
                f"multiple of {2**self.halvings}, or another --autoencoder.halvings"
            )
        return side

    def build(self, images: ImageSpec) -> nn.Module:
        self.side(images.resolution)
        codebook = Codebook(self.codes, self.length)
        return Autoencoder(self._encoder(images.channels), codebook, self._decoder(images.channels))

    def _encoder(self, channels: int) -> nn.Sequential:
        width, layers = self.width, []
        for i in range(self.halvings):
            layers += [nn.Conv2d(width if i else channels, width, 4, stride=2, padding=1)]
            layers += [nn.ReLU()] * (i < self.halvings - 1)
        layers += [Residual(width) for _ in range(self.blocks)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, self.length, 1))

    def _decoder(self, channels: int) -> nn.Sequential:
        width, layers = self.width, [nn.Conv2d(self.length, self.width, 1)]
        layers += [Residual(width) for _ in range(self.blocks)]
        for i in range(self.halvings):
            after = width if i < self.halvings - 1 else channels
            layers += [nn.ReLU(), nn.ConvTranspose2d(width, after, 4, stride=2, padding=1)]
        return nn.Sequential(*layers)
