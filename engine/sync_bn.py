"""BatchNorm whose statistics are those of the global batch, on CPUs and GPUs alike.

torch's SyncBatchNorm refuses CPUs; this twin serves there, so that "one rank with batch 2B equals
two ranks with batch B" can be tried on any machine.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; the gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ANN001
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # noqa: ANN001
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batch of all ranks (equal shares); state as in BatchNorm1d and 2d.

    Ioffe and Szegedy 2015, algorithm 1; the variance is taken about the global mean, not as a
    difference of squares.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        assert x.dim() >= 2

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C) or (N, C, H, W), any float dtype; the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.float()
        count = wide.numel() // wide.shape[1] * dist.get_world_size()
        mean_C = _SumOverRanks.apply(wide.sum(axes)) / count
        centred = wide - mean_C.view(shape)
        variance_C = _SumOverRanks.apply(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._track(mean_C.detach(), variance_C.detach() * (count / max(count - 1, 1)))
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return (centred * scale_C.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C, self.momentum)
        self.num_batches_tracked += 1


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with every BatchNorm layer replaced by one over all ranks."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if isinstance(network, nn.modules.batchnorm._BatchNorm):
        twin = GlobalBatchNorm(network.num_features, network.eps, network.momentum)
        twin.load_state_dict(network.state_dict())
        return twin
    for name, child in network.named_children():
        setattr(network, name, synchronised(child, device))
    return network
