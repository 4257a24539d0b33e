"""The command line, run in this process and in a folder of its own."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from vil_lightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
SHRINK = [
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.log_every_n_steps", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--model.backbone.kwargs", "{img_size: 16, patch_size: 8, embed_dim: 32, depth: 2}"),
    *("--model.num_prototypes", "32", "--model.head_hidden_dim", "32", "--model.head_bottleneck_dim", "16"),
    *("--data.train_transform.num_local_views", "1", "--data.batch_size", "16", "--model.base_lr", "0.002"),
]
PRETRAIN = ["fit", "--config", str(CONFIGS / "pretrain_dino.yaml"), *SHRINK]
PROBE = [
    *("fit", "--config", str(CONFIGS / "linear_probe.yaml"), "--trainer.max_epochs", "2"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
]


def invoke(args: list[str], folder: Path) -> SimpleNamespace:
    """Run the command line in `folder`; returns its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    here, environment = Path.cwd(), os.environ.copy()
    os.environ["COLUMNS"] = "200"
    os.chdir(folder)
    argv, sys.argv = sys.argv, ["main.py"]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            main(args)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = argv
        os.chdir(here)
        os.environ.clear()  # the seed that the run leaves behind
        os.environ.update(environment)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


Command = Callable[..., SimpleNamespace]
