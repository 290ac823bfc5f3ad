"""In which style are images to be drawn? What `engine.translate` needs of --style and --alpha.

Shapes: N batch, C channels, H height, W width.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from engine.algorithm import Algorithm
from engine.trained import Trained

Make = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [-1, 1] of images


def takes_style(trained: Trained) -> bool:
    """Whether the model draws images in the style of others."""
    return type(trained.recipe.step).stylise is not Algorithm.stylise


def check_flags(styles: dict[str, Path], alpha: float) -> None:
    """Raise ValueError where --alpha is no share, or there is no style that it could be one of."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha {alpha:g} must be from 0 (the content) to 1 (all of the style)")
    if alpha != 1 and not styles:
        raise ValueError(f"--alpha {alpha:g} goes with --style: give it too, or leave it out")


def check_model(trained: Trained, styles: dict[str, Path]) -> None:
    """Raise ValueError where the model needs a style that is not given, or the other way round."""
    if takes_style(trained) and not styles:
        raise ValueError(f"{trained.name} draws in the style of an image: give --style IMAGE")
    if styles and not takes_style(trained):
        raise ValueError(f"{trained.name} takes no style: leave --style out")


def targets(names: list[str], styles: list[str]) -> list[tuple[str, str, str]]:
    """(input, style, what is made of both) by name: NAME where there is one style, else
    NAME-STYLE. Raises ValueError where two would be of one name."""
    several, found = len(styles) > 1, {}
    for name in names:
        for style in styles:
            made = f"{name}-{style}" if several else name
            if found.setdefault(made, (name, style)) != (name, style):
                one, other = found[made], (name, style)
                raise ValueError(
                    f"{one[0]} in the style of {one[1]} and {other[0]} in that of {other[1]} would "
                    f"both become {made}.png: rename a file"
                )
    return [(name, style, made) for made, (name, style) in found.items()]


def maker(trained: Trained, style_NCHW: Tensor, alpha: float) -> Make:
    """What draws images in the style of this one (1, C, H, W), which may be of any size."""
    step = trained.recipe.step
    least = step.translation(trained.recipe.data).multiple
    height, width = style_NCHW.shape[2:]
    missing = (0, max(least - width, 0), 0, max(least - height, 0))
    style_NCHW = F.pad(style_NCHW.to(trained.device), missing, "replicate")
    return partial(step.stylise, trained.networks, style_NCHW=style_NCHW, alpha=alpha)
