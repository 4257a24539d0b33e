"""Sequence operators. This package needs torch and nothing else."""

from vil_lightning.ops.mlstm import MLSTM_BACKENDS, MLSTMBackend, describe_backend, mlstm
from vil_lightning.ops.parallel import mlstm_weights
from vil_lightning.ops.selective_scan import SELECTIVE_SCAN_BACKENDS, SelectiveScanBackend, selective_scan

__all__ = [
    "MLSTM_BACKENDS",
    "SELECTIVE_SCAN_BACKENDS",
    "MLSTMBackend",
    "SelectiveScanBackend",
    "describe_backend",
    "mlstm",
    "mlstm_weights",
    "selective_scan",
]
