"""Style transfer: a decoder learns to draw what AdaIN makes of any content and any style.

Huang and Belongie 2017, https://arxiv.org/abs/1703.06868, section 5: of content images c and style
images s, t = AdaIN(f(c), f(s)) and g the decoder, minimise

    |f(g(t)) - t|^2 + style_weight sum_i (|mean(phi_i(g(t))) - mean(phi_i(s))|^2
                                   + |std(phi_i(g(t))) - std(phi_i(s))|^2)

(equations 11 to 13) where f is the encoder up to relu4_1 and phi_i its relu1_1, relu2_1, relu3_1
and relu4_1. Squares are means over all values, not sums. The encoder is fixed: VGG19 where --vgg
gives its weights, random otherwise (`engine.networks.adain`).

Shapes: N batch, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.algorithm import Algorithm, Networks, Values
from engine.networks.adain import VGG_WIDTH, adain, statistics
from engine.networks.vgg import read_state
from engine.player import Player
from engine.settings import PlayerSettings
from engine.translation import Translation
from pipelines.batch import Batch
from pipelines.settings import UNPAIRED, Data


@dataclass(frozen=True)
class Stylising(Algorithm):
    """A fixed encoder and a decoder, one player."""

    styler: PlayerSettings
    style_weight: float = 10.0
    """Weight of the distance of the features' means and standard deviations from the style's."""
    vgg: Path | None = None
    """VGG19's weights for the encoder: torchvision's file (.pth), or .safetensors; none takes
    random ones. Checkpoints keep them: a run translates without the file."""

    def check(self) -> None:
        if self.style_weight < 0:
            raise ValueError(f"--style-weight {self.style_weight} must not be negative")
        width = self.styler.network.width
        if self.vgg and width != VGG_WIDTH:
            raise ValueError(
                f"--styler.width {width}: the layers of --vgg are {VGG_WIDTH} wide; leave it out"
            )

    def check_data(self, data: Data) -> None:
        if data.name not in UNPAIRED:
            raise ValueError(
                f"data.name={data.name} has no images of content and of style: give --data.name "
                f"unpaired and --data.path FOLDER with content/ and style/"
            )

    def notes(self) -> tuple[str, ...]:
        if self.vgg:
            return (f"encoder: VGG19, {self.vgg}",)
        return (
            "encoder: no --vgg FILE, so random weights in place of VGG19's, fixed by --seed: it "
            "takes over colours and textures, and knows no objects; not the paper's model",
        )

    def translation(self, data: Data) -> Translation:
        return Translation(multiple=16)  # AdaIN looks at the whole image

    def stylise(
        self, networks: Networks, images_NCHW: Tensor, style_NCHW: Tensor, alpha: float
    ) -> Tensor:
        return networks["styler"](images_NCHW, style_NCHW, alpha).float()

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """Content, style, and the one in the style of the other."""
        both = batch.images_NCHW, batch.pair_NCHW
        return *both, self.stylise(networks, *both, alpha=1.0)

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        """Both losses of each image, (N,), and those of what one has without a model: the content
        as it is (_identity), and the style image itself (_style_image)."""
        network, given_NCHW, style_NCHW = networks["styler"], batch.images_NCHW, batch.pair_NCHW
        goal_NCHW, made_NCHW, wanted = drawn(network, given_NCHW, style_NCHW)
        shown = {"": made_NCHW, "_identity": given_NCHW, "_style_image": style_NCHW}
        values = {}
        for suffix, images_NCHW in shown.items():
            found = network.encoder(images_NCHW)
            values[f"content{suffix}"] = content_N(found[-1], goal_NCHW)
            values[f"style{suffix}"] = style_N(found, wanted)
        return values

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        styler = players["styler"]
        if self.vgg:
            fill(styler, read_state(self.vgg, styler.network.encoder))
        loss = partial(stylising_update, style=self.style_weight)

        def step(batch: Batch) -> Values:
            return styler.update(loss, batch.images_NCHW, batch.pair_NCHW)

        return step


def fill(styler: Player, state: dict[str, Tensor]) -> None:
    """Put weights into the encoder, and into its average where there is one."""
    kept = [dict(styler.network.named_buffers())]
    kept += [styler.average.buffers()] if styler.average else []
    for buffers in kept:
        for name, value in state.items():
            buffers[f"encoder.{name}"].copy_(value)


def drawn(
    network: nn.Module, content_NCHW: Tensor, style_NCHW: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What features are aimed at (t), the images made of them (g(t)), and the style's features."""
    wanted = network.encoder(style_NCHW)
    goal_NCHW = adain(network.encoder(content_NCHW)[-1], wanted[-1])
    return goal_NCHW, network.decoder(goal_NCHW), wanted


def stylising_update(
    network: nn.Module, content_NCHW: Tensor, style_NCHW: Tensor, *, style: float
) -> tuple[Tensor, Values]:
    """The loss and its two parts."""
    goal_NCHW, made_NCHW, wanted = drawn(network, content_NCHW, style_NCHW)
    found = network.encoder(made_NCHW)
    values = {
        "content": content_N(found[-1], goal_NCHW).mean(),
        "style": style_N(found, wanted).mean(),
    }
    return values["content"] + style * values["style"], values


def content_N(found_NCHW: Tensor, goal_NCHW: Tensor) -> Tensor:
    """The mean squared difference of features from those aimed at, float32 (N,) (equation 12)."""
    return (found_NCHW.float() - goal_NCHW).square().flatten(1).mean(1)


def style_N(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """The mean squared difference of means, and of standard deviations, summed over the layers,
    float32 (N,) (equation 13)."""
    apart = [
        (a_NC11 - b_NC11).square().flatten(1).mean(1)
        for pair in zip(found, wanted, strict=True)
        for a_NC11, b_NC11 in zip(*map(statistics, pair), strict=True)
    ]
    return torch.stack(apart).sum(0)
