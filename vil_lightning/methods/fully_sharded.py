"""Fully sharded training (FSDP2) of the methods here, as a strategy of Lightning's trainer: `configs/trainer/fsdp.yaml`."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizer_to_device, _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from vil_lightning.errors import ConfigError
from vil_lightning.sharding import full, gathering, is_sharded, shard, shard_like

# What runs parts of a network outside of `training_step`.
_CALLING_HOOKS = ("on_fit_start", "on_validation_start", "validation_step", "test_step", "predict_step")


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes: parameters, gradients, optimiser state and moving averages are cut into slices.

    Lightning's own strategy leaves the cutting to every module, writes folders of slices, and numbers the optimiser's state
    differently from all others. This one shards what `configure_model` has built (see `vil_lightning.sharding.shard`), and its
    checkpoints are those of a run on one process: one file with whole, plain tensors, written by the first process. So they
    are read, and resumed, by any number of processes with any strategy.

    Precision: `32-true`, `bf16-mixed` (autocast, as without sharding: weights travel in float32) and `bf16-true`.

    Args:
        process_group_backend: `nccl` on GPUs and `gloo` on CPUs if None.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Lightning's, but for the sharding, for which it looks to `configure_model`."""
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if not is_sharded(self.model):  # it is if the trainer has run before
            if self._layer_sync is not None:  # trainer.sync_batchnorm
                self.model = self._layer_sync.apply(self.model)
            self.model = self.precision_plugin.convert_module(self.model)
            shard(self.model, self.device_mesh["data_parallel"], self.root_device)
            for name in _CALLING_HOOKS:
                setattr(self.model, name, gathering(self.model, getattr(self.model, name)))
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Then gives every process the first one's statistics of batch norms, as DDP does before every pass."""
        result = super().optimizer_step(*args, **kwargs)
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                for statistics in module.buffers():
                    dist.broadcast(statistics, src=0)
        return result

    # --- checkpoints: as without sharding -----------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # `setup` asks for the data, which has to know by then where it goes on

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors; on the first process only. All processes have to ask."""
        assert self.model is not None
        return self._whole(self.model.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `optimizer.state_dict()`, with whole tensors; on the first process only. All processes have to ask."""
        return self._whole(
            (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        )

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        def whole(tensor: DTensor) -> Tensor | None:
            value = full(tensor.detach())
            return value.cpu() if self.is_global_zero else None

        state = apply_to_collection(state, DTensor, whole)
        return state if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Before sharding in general; after it if a trainer runs again."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        values = {
            name: shard_like(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(values, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            slices = {
                index: {
                    name: shard_like(value, parameters[index])
                    if isinstance(value, Tensor) and value.shape == parameters[index].shape
                    else value  # a number of steps
                    for name, value in values.items()
                }
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": slices})
            _optimizer_to_device(optimizer, self.root_device)


def check_precision(precision: Any) -> None:
    """Refuse what Lightning's strategy refuses in other words, and float16, which would not be scaled.

    Raises:
        ConfigError: Naming what can be used.
    """
    if precision not in (None, 32, "32", "32-true", "bf16", "bf16-mixed", "bf16-true"):
        raise ConfigError(
            f"trainer.precision={precision} cannot be used with trainer.strategy=FullyShardedStrategy. Set it to 32-true, "
            "bf16-mixed or bf16-true."
        )


def refuse_sharding(trainer: L.Trainer, method: str, reason: str, strategy: str) -> None:
    """In the `setup` of a method that cannot be sharded.

    Raises:
        ConfigError: If it is to be, with the reason and what to set `trainer.strategy` to.
    """
    if isinstance(trainer.strategy, FullyShardedStrategy):
        raise ConfigError(
            f"trainer.strategy=FullyShardedStrategy: {method} cannot be sharded, since {reason}. Leave out "
            f"configs/trainer/fsdp.yaml, or set trainer.strategy to {strategy}."
        )


_REMEDY = "Lay configs/trainer/fsdp.yaml over the recipe for sharded training, or set trainer.strategy to ddp."


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies under which gradients would not be averaged, or norms of slices be taken for those of tensors.

    Raises:
        ConfigError: Naming what to use instead.
    """
    strategy = getattr(trainer, "strategy", None)
    other = isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FullyShardedStrategy)
    if other or isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigError(f"trainer.strategy={type(strategy).__name__} does not fit the methods here. {_REMEDY}")
