"""Simple signs that a run is collapsing, said in plain words."""

import torch
from torch import Tensor

SATURATED, TICKS = 0.01, 3
ALIKE, PICTURES, EARLY_IMAGES = 0.2, 2, 20_000
COPIED = 0.5


class Monitors:
    """Watches the statistics of a run; warns once for each trouble until it has passed."""

    def __init__(self) -> None:
        self._saturated = 0
        self._alike = 0
        self._said: set[str] = set()

    def warnings(self, images: int, values: dict[str, float]) -> list[str]:
        """What a tick's values give cause to say, once the run is past its first images."""
        if images < EARLY_IMAGES:
            return []
        said = [self.opinions(values)]
        if "monitor/diversity" in values:
            said.append(self.diversity(values["monitor/diversity"]))
        if "monitor/neighbour_distance" in values:
            said.append(self.memorising(values["monitor/neighbour_distance"]))
        return [text for text in said if text]

    def opinions(self, values: dict[str, float]) -> str:
        """A warning if the discriminator has been sure of everything for some ticks, or empty."""
        real, fake = values.get("discriminator/real"), values.get("discriminator/fake")
        if real is None or fake is None:
            return ""
        sure = real > 1 - SATURATED and fake < SATURATED
        self._saturated = self._saturated + 1 if sure else 0
        text = (
            f"the discriminator is sure of everything (D(x) {real:.3f}, D(G(z)) {fake:.3f}): the "
            f"generator learns little; lower --discriminator.lr or raise --generator.lr"
        )
        return self._once("saturation", text, self._saturated >= TICKS)

    def diversity(self, ratio: float) -> str:
        """A warning if samples have been far more alike than real images for some pictures (the
        first ones are: an untrained generator hardly varies), or empty."""
        self._alike = self._alike + 1 if ratio < ALIKE else 0
        text = (
            f"samples are nearly alike (their pairwise distance is {ratio:.0%} of the real "
            f"images'): the generator has probably collapsed; go back to an earlier checkpoint "
            f"with a lower learning rate"
        )
        return self._once("diversity", text, self._alike >= PICTURES)

    def memorising(self, distance: float) -> str:
        """A warning if samples lie far nearer to training images than unseen images do, or
        empty."""
        text = (
            f"samples lie much nearer to training images than unseen images do ({distance:.0%} of "
            f"their distance): the model may be memorising; compare the rows of neighbours.png, "
            f"and train on more images or go back to an earlier checkpoint"
        )
        return self._once("memorising", text, distance < COPIED)

    def _once(self, trouble: str, text: str, present: bool) -> str:
        if not present:
            self._said.discard(trouble)
            return ""
        if trouble in self._said:
            return ""
        self._said.add(trouble)
        return text


def pairwise_distance(images_NCHW: Tensor) -> Tensor:
    """Mean Euclidean distance between different images of a set, ()."""
    return torch.pdist(images_NCHW.flatten(1).float()).mean()
