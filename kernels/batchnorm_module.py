"""BatchNorm + LeakyReLU as a module, and the conversion of a network that has them apart.

State dicts stay as they are: the module has nn.BatchNorm2d's, in the place where that was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor, nn

from kernels.batchnorm_leaky_relu import Save, batchnorm_leaky_relu, reference
from kernels.batchnorm_sync import sync_batchnorm_leaky_relu, sync_reference

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNormLeakyReLU(nn.modules.batchnorm._NormBase):
    """LeakyReLU of BatchNorm for inputs (N, C) to (N, C, D, H, W). No subclass of _BatchNorm, which
    nn.SyncBatchNorm.convert_sync_batchnorm would replace, activation and all: see `synchronise`.

    slope: of the activation; 0 is ReLU, 1 is none. save: see `batchnorm_leaky_relu`.
    synchronised: statistics in training are those of all ranks. The other arguments and the state
    are those of nn.BatchNorm2d.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        slope: float = 0.2,
        save: Save = "input",
        synchronised: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.slope, self.save, self.synchronised = slope, save, synchronised
        self.plain = False  # see `plain`

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm, slope: float) -> "BatchNormLeakyReLU":
        """The module that does what `norm` and an activation do, with norm's own tensors."""
        settings = (norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made = cls(norm.num_features, *settings, slope)
        made._parameters, made._buffers = norm._parameters, norm._buffers
        return made.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        if not 2 <= x.ndim <= 5:
            raise ValueError(f"expected 2D to 5D input (got {x.ndim}D input)")

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, ...), any float dtype; the same shape and dtype."""
        self._check_input_dim(x)
        momentum, tracking = self.momentum or 0.0, self.training and self.track_running_stats
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        kept = (
            (self.running_mean, self.running_var) if tracking or not self.training else (None,) * 2
        )
        own = self.training or kept[0] is None  # the batch's own statistics
        affine = (self.weight, self.bias)
        if self.synchronised and self.training and dist.is_initialized():
            function = sync_reference if self.plain else sync_batchnorm_leaky_relu
            return function(x, *affine, *kept, momentum, self.eps, self.slope)
        if self.plain:
            return reference(x, *affine, *kept, own, momentum, self.eps, self.slope)
        return batchnorm_leaky_relu(
            x, *affine, *kept, own, momentum, self.eps, self.slope, self.save
        )

    def extra_repr(self) -> str:
        own = f"slope={self.slope}, save={self.save!r}, synchronised={self.synchronised}"
        return f"{super().extra_repr()}, {own}"


def fuse(network: nn.Module) -> nn.Module:
    """The network with BatchNorm and the ReLU or LeakyReLU after it made one module, wherever a
    Sequential has them in a row, without hooks; nn.Identity takes the activation's place, so keys
    stay."""
    for child in network.children():
        fuse(child)
    if isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward:
        names = list(network._modules)
        for name, after in pairwise(names):
            norm, slope = network._modules[name], _slope(network._modules[after])
            hooked = _hooked(norm) or _hooked(network._modules[after])
            if type(norm) in NORMS and slope is not None and not hooked:
                network._modules[name] = BatchNormLeakyReLU.of(norm, slope)
                network._modules[after] = nn.Identity()
    return network


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or bool(module._backward_pre_hooks)


def _slope(module: nn.Module | None) -> float | None:
    if isinstance(module, nn.LeakyReLU) and 0 <= module.negative_slope <= 1:
        return module.negative_slope
    return 0.0 if isinstance(module, nn.ReLU) else None


def synchronise(network: nn.Module) -> nn.Module:
    """The network with statistics over all ranks in every BatchNorm, fused or not."""
    if isinstance(network, BatchNormLeakyReLU):
        network.synchronised = True
    elif type(network) in NORMS:
        network = BatchNormLeakyReLU.of(network, 1.0)
        network.synchronised = True
    for name, child in network.named_children():
        network._modules[name] = synchronise(child)
    return network


@contextmanager
def plain(network: nn.Module) -> Iterator[None]:
    """Plain PyTorch inside: what is differentiated twice in a compiled function, or by
    torch.func.grad, must not be an operation of ours (its parameter gradients would be wrong)."""
    modules = [m for m in network.modules() if hasattr(m, "plain")]
    for m in modules:
        m.plain = True
    try:
        yield
    finally:
        for m in modules:
            m.plain = False
