"""Sequence operators. This package needs torch and nothing else."""

from vil_lightning.ops.mlstm import MLSTM_BACKENDS, MLSTMBackend, mlstm

__all__ = ["MLSTM_BACKENDS", "MLSTMBackend", "mlstm"]
