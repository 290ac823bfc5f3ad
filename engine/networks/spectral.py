"""Spectral normalisation: every weight divided by its largest singular value.

Miyato et al. 2018, "Spectral normalization for generative adversarial networks", section 2.1 and
algorithm 1: one power iteration per forward in training. Not torch's own parametrization, which
keeps both singular vectors (moving averages of them are a pair of no matrix), renames the weights,
and cannot be compiled once a copy of the network was unwrapped.

Shapes: O rows of a weight (its outputs), I the rest.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ITERATIONS = 15  # before the first forward
SMALLEST = 1e-12  # of a norm that is divided by


class Normalised(nn.Module):
    """A layer whose weight is divided by an estimate of its largest singular value: u' W v with
    v = W' u normalised; u follows W in training.

    A forward for which nothing is to follow (`statistics_kept`) divides by what the last one did.
    """

    axis = 0  # of the weight's outputs
    track_running_stats: bool  # whether u follows, as for BatchNorm's statistics
    singular_O: Tensor
    before_O: Tensor  # what singular_O was made of

    def begin(self) -> None:
        """Make the estimate of a fresh weight."""
        weight = self.weight.detach()
        generator = torch.Generator().manual_seed(weight.numel())
        u_O = torch.randn(weight.shape[self.axis], generator=generator).to(weight.device)
        self.register_buffer("singular_O", u_O)
        self.register_buffer("before_O", u_O, persistent=False)
        self.track_running_stats = True
        for _ in range(ITERATIONS):
            self.before_O = self.singular_O
            self.singular_O = self._vectors(self._rows(weight), self.before_O)[0]

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.axis, 0).flatten(1)

    def _vectors(self, weight_OI: Tensor, before_O: Tensor) -> tuple[Tensor, Tensor]:
        """The next estimate of the singular vectors, (O,) and (I,)."""
        v_I = F.normalize(applied(weight_OI.T, before_O), dim=0)
        return F.normalize(applied(weight_OI, v_I), dim=0), v_I

    def normalised(self) -> Tensor:
        """The weight over its norm."""
        weight_OI = self._rows(self.weight)
        with torch.no_grad():
            again = self.training and not self.track_running_stats
            before_O = kept(self.before_O if again else self.singular_O)
            u_O, v_I = self._vectors(weight_OI, before_O)
            if self.training and self.track_running_stats:
                self.before_O.copy_(before_O)
                self.singular_O.copy_(u_O)
        return self.weight / ((u_O * applied(weight_OI, v_I)).sum() + SMALLEST)


@torch.library.custom_op("saddle::kept", mutates_args=())
def kept(vector: Tensor) -> Tensor:
    """A copy of a float vector, which a compiled backward pass cannot make again: it would copy
    what has meanwhile been written over, and differentiate the next estimate."""
    return vector.clone()


@kept.register_fake
def _(vector: Tensor) -> Tensor:
    return torch.empty_like(vector)


def applied(matrix: Tensor, vector: Tensor) -> Tensor:
    """Their product, in float32: autocast would take matmul to 16 bits."""
    return (matrix * vector).sum(1)


class Conv2d(Normalised, nn.Conv2d):
    """The convolution."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self._conv_forward(x_NCHW, self.normalised(), self.bias)


class ConvTranspose2d(Normalised, nn.ConvTranspose2d):
    """The transposed convolution."""

    axis = 1

    def forward(self, x_NCHW: Tensor) -> Tensor:
        places = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(x_NCHW, self.normalised(), self.bias, *places)


class Linear(Normalised, nn.Linear):
    """The linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)


class Embedding(Normalised, nn.Embedding):
    """The embedding."""

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.normalised())


KINDS: dict[type, type[Normalised]] = {
    nn.Conv2d: Conv2d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.Linear: Linear,
    nn.Embedding: Embedding,
}


def spectral_norm(network: nn.Module) -> nn.Module:
    """The network with the weight of every convolution, linear layer and embedding normalised; its
    parameters keep their names and values."""
    for module in network.modules():
        if type(module) in KINDS:
            module.__class__ = KINDS[type(module)]
            module.begin()
    return network


@torch.no_grad()
def folded(network: nn.Module) -> nn.Module:
    """The network in eval mode with normalised weights as plain ones, in place."""
    plain = {kind: layer for layer, kind in KINDS.items()}
    for module in network.eval().modules():
        if isinstance(module, Normalised):
            module.weight.copy_(module.normalised())
            del module.singular_O
            module.__class__ = plain[type(module)]
    return network
