"""What engine.sample draws for a caption.

Shapes: N images, C channels, H height, W width, L words of a caption.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from engine import pictures
from engine.anomalies import in_colours, spread
from engine.draw import Command, check_size, write, write_samples
from engine.trained import Trained
from engine.verb import warn
from pipelines.captions import LENGTH, encode_text

TOGETHER = 8
"""Images of a forward, at most: fewer are asked for than of a model without captions."""
LEAST = 80
"""Pixels of a column with a word over it, at least."""


def samples(command: Command, trained: Trained) -> None:
    """A grid, single files, or both, of samples of the caption."""
    count = command.num or TOGETHER
    tokens_1L, lengths_1 = caption_of(command, trained)
    made = _made(command, trained, count, tokens_1L, lengths_1)
    write_samples(command, trained, count, made, f"{count} samples of {command.caption!r}")


def caption_of(command: Command, trained: Trained) -> tuple[Tensor, Tensor]:
    """The caption as int64 (1, L) and its length (1,), on the model's device; words that the model
    does not know, or that are too many, are named. Raises ValueError where it knows none, or draws
    no captions."""
    if not trained.recipe.step.draws_captions():
        raise ValueError(f"--caption is for text-to-image models, not {trained.name}")
    tokens_L, length, unknown, late = encode_text(command.caption, trained.words)
    if unknown:
        warn(f"left out of the caption, not among the words of training: {', '.join(unknown)}")
    if late:
        warn(f"left out of the caption, of which {LENGTH} words are read: {' '.join(late)}")
    tokens_1L = torch.from_numpy(tokens_L)[None].to(trained.device)
    return tokens_1L, torch.tensor([length], device=trained.device)


def _made(
    command: Command, trained: Trained, count: int, tokens_1L: Tensor, lengths_1: Tensor
) -> Iterator[Tensor]:
    """The images, batch by batch; every forward has as many, as in `Model.decode`."""
    batch, step = min(command.batch, TOGETHER), trained.recipe.step
    tokens_NL, lengths_N = tokens_1L.repeat(batch, 1), lengths_1.repeat(batch)
    for first in range(0, count, batch):
        z_NL = trained.latents(command.seed, torch.arange(first, first + batch))
        with torch.no_grad():
            images_NCHW = step.captioned(trained.networks, z_NL, tokens_NL, lengths_N)
        yield images_NCHW[: count - first].cpu()


def attention_maps(command: Command, trained: Trained) -> None:
    """A row for each sample: the image, and where each word of the caption went in it, from black
    where least of it did to white where most."""
    count = command.num or 4
    tokens_1L, lengths_1 = caption_of(command, trained)
    names = [trained.words[token] for token in tokens_1L[0, : int(lengths_1)].tolist()]
    columns = 1 + len(names)
    check_size(trained, count * columns, "--num")
    z_NL = trained.latents(command.seed, torch.arange(count))
    told = tokens_1L.repeat(count, 1), lengths_1.repeat(count)
    with torch.no_grad():
        images_NCHW, share_NThw = trained.recipe.step.attended(trained.networks, z_NL, *told)
    heat_NThw = spread(share_NThw[:, : len(names)].float())
    heat_NTHW = interpolate(heat_NThw, images_NCHW.shape[2:], mode="bilinear")
    maps = in_colours(heat_NTHW.flatten(0, 1)[:, None]).unflatten(0, heat_NTHW.shape[:2])
    rows = torch.cat([images_NCHW.expand(-1, 3, -1, -1)[:, None], maps], 1)
    picture = pictures.grid(rows.flatten(0, 1).cpu(), columns, least=columns * LEAST)
    what = f"{count} samples of {command.caption!r}, and where each word went"
    origin = trained.origin(command.seed, composite=True)
    write(pictures.headed(picture, ["", *names]), command.out, what, origin)
