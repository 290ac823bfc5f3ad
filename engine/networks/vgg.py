"""VGG19's convolutions, a fixed judge of how alike images look.

Simonyan and Zisserman 2015, "Very deep convolutional networks for large-scale image recognition",
https://arxiv.org/abs/1409.1556, table 1, column E: up to conv5_4 and its ReLU, phi_{5,4} of Ledig
et al. 2017, or its first layers, seen at several places, as Huang and Belongie 2017 take them.
Weights are those of torchvision's file, which are for images normalised as below.

Shapes: N batch, C channels, H height, W width.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.networks.weights import read

Blocks = tuple[tuple[int, int], ...]
BLOCKS: Blocks = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEAST = 16
"""Side of the smallest images that go through the four poolings."""
EXPECTED = "--vgg takes torchvision's VGG19 (vgg19-dcbb9e9d.pth), or its state dict as .safetensors"


class Vgg19(nn.Module):
    """The layers under torchvision's names: features.0.weight and so on; all of them, or those of
    some blocks (channels, convolutions). padding: zeros, or reflect."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, blocks: Blocks = BLOCKS, padding: str = "zeros") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []  # the first ReLU of each block
        before = 3
        for width, count in blocks:
            layers += [nn.MaxPool2d(2)] if layers else []
            self.taps.append(len(layers) + 1)
            for _ in range(count):
                convolution = nn.Conv2d(before, width, 3, padding=1, padding_mode=padding)
                layers += [convolution, nn.ReLU()]
                before = width
        self.features = nn.Sequential(*layers)
        for name, values in (("mean_C11", MEAN), ("std_C11", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def normalised(self, x_NCHW: Tensor) -> Tensor:
        """Images in [-1, 1], grey or colour, as the weights want them, (N, 3, H, W)."""
        x_NCHW = ((x_NCHW + 1) / 2).expand(-1, 3, -1, -1)
        return (x_NCHW - self.mean_C11) / self.std_C11

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features (N, 512, H // 16, W // 16) of images in [-1, 1], grey or colour."""
        return self.features(self.normalised(x_NCHW))


class TappedVgg19(Vgg19):
    """The first layers, seen after the first ReLU of each block."""

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        """Features of images in [-1, 1], grey or colour: relu1_1 of their size, relu2_1 of half of
        it and so on."""
        x_NCHW, found = self.normalised(x_NCHW), []
        for number, layer in enumerate(self.features):
            x_NCHW = layer(x_NCHW)
            if number in self.taps:
                found.append(x_NCHW)
        return found


def read_vgg(path: Path, device: torch.device) -> Vgg19:
    """The network with a file's weights, fixed, on the device. Raises ValueError naming the flag
    where the file is another's."""
    network = Vgg19()
    network.load_state_dict(read_state(path, network))
    return network.to(device).eval().requires_grad_(False)


def read_state(path: Path, network: Vgg19) -> dict[str, Tensor]:
    """A file's weights of the layers that the network has, on the host. Raises ValueError naming
    the flag where the file is another's."""
    return read(network, path, "--vgg", "VGG19's", EXPECTED)
