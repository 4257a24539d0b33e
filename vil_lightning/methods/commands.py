"""Commands that a run suggests when it has ended."""

from pathlib import Path

import lightning as L


def probe_command(module: L.LightningModule, checkpoint: str) -> str:
    """Score the features in `checkpoint` on the data of the run."""
    command = f"python main.py fit --config configs/linear_probe.yaml --model.backbone.weights {checkpoint}"
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    options = data.source_options() if data.labelled else "--data ImageFolder --data.root <images with labels>"
    if options:  # not the data set of that recipe
        command += f" {options} --data.img_size {data.img_size}"
        command += f" --data.mean '{list(data.mean)}' --data.std '{list(data.std)}'"
        command += f" --run_name {Path(checkpoint).parent.name}_probe"
    return command


def finetune_command(module: L.LightningModule, checkpoint: str) -> str:
    """Fine-tune the network in `checkpoint`; where there is no recipe for the run's data, score its features."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    if data.source_options() or not data.labelled:
        return probe_command(module, checkpoint)
    return f"python main.py fit --config configs/finetune.yaml --model.backbone.weights {checkpoint}"
