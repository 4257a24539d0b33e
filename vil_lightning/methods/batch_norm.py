"""Batch norm over the images of all processes, on GPUs and on CPUs.

torch's `SyncBatchNorm` runs on GPUs only, and Lightning's conversion to it drops the activation that timm keeps inside its own
batch norms (`BatchNormAct2d`). timm's conversion knows about that; for CPUs there is a plain version.
"""

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNormSync(LayerSync):
    """What `trainer.sync_batchnorm` does here: every batch norm is replaced for a run, and put back afterwards.

    Args:
        on_cpu: Whether the processes compute on CPUs.
    """

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu
        self._replaced: dict[str, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm | GlobalBatchNorm):
                self._replaced[name] = module
                model.set_submodule(name, GlobalBatchNorm(module) if self.on_cpu else convert_sync_batchnorm(module))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for name, module in self._replaced.items():
            current = model.get_submodule(name)
            # The tensors may have been moved to another device in between.
            module._parameters, module._buffers = current._parameters, current._buffers
            module.train(current.training)
            model.set_submodule(name, module)
        self._replaced = {}
        return model


class GlobalBatchNorm(_BatchNorm):
    """A batch norm with mean and variance of all processes' values, in plain torch; tensors and names are the original's.

    Args:
        norm: The original.
    """

    synchronised = True  # for reports; DDP allows no subclass of SyncBatchNorm on CPUs

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        for name, child in norm.named_children():  # timm's: dropout, then the activation
            self.add_module(name, child)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        if self.training or self.running_mean is None:
            mean, variance = self._of_all_processes(x.float())
        else:
            assert self.running_var is not None
            mean, variance = self.running_mean, self.running_var
        shape = (1, -1, *[1] * (x.dim() - 2))
        y = (x - mean.view(shape).to(x)) * (variance + self.eps).rsqrt().view(shape).to(x)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        for child in self.children():
            y = child(y)
        return y

    def _of_all_processes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (C,) of each channel, through which gradients reach every process."""
        dims = [0, *range(2, x.dim())]
        count = x.new_tensor(x.numel() / x.shape[1])
        dist.all_reduce(count)
        mean = all_reduce(x.sum(dims)) / count
        deviations = x - mean.view(1, -1, *[1] * (x.dim() - 2))
        variance = all_reduce(deviations.square().sum(dims)) / count
        if self.training:
            self._track(mean, variance, int(count))
        return mean, variance

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None:
            return
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var), momentum)
