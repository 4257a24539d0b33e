"""Does DINO learn on the built-in digits? Trained against untrained backbones, several seeds, kNN and 5-shot probe.

    python benchmarks/digits_dino.py --seeds 0 1 2 [--config FILE] [-- extra command-line arguments of the run]

Prints a Markdown table. The 5-shot score is logistic regression on 5 images per class, mean over 20 draws, on features
standardised with the training set; kNN has k = 20 and the whole training set as bank. Raw pixels are scored alike.
"""

import argparse
import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from vil_lightning.backbones.weights import read_file
from vil_lightning.data import Digits
from vil_lightning.knn import knn_accuracy
from vil_lightning.methods.backbone import CHECKPOINT_KEY, BackboneConfig, build_backbone

ROOT = Path(__file__).resolve().parents[1]


@torch.no_grad()
def features(backbone: nn.Module | None, data: Digits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of train and val; raw pixels without a backbone."""
    out = []
    for loader in (data.eval_train_dataloader(), data.val_dataloader()):
        xs, ys = [], []
        for images, labels in loader:
            images = data.normalize(images)
            xs.append(backbone.eval()(images) if backbone is not None else images[:, 0].flatten(1))
            ys.append(labels)
        out += [torch.cat(xs), torch.cat(ys)]
    return out[0], out[1], out[2], out[3]


def scores(backbone: nn.Module | None, data: Digits) -> tuple[float, float]:
    """KNN accuracy and 5-shot accuracy in percent."""
    bank, bank_labels, queries, query_labels = features(backbone, data)
    knn = knn_accuracy(bank, bank_labels, queries, query_labels, ks=(20,))[20]
    mean, std = bank.mean(0), bank.std(0).clamp(min=1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    generator = torch.Generator().manual_seed(0)
    shots = []
    for _ in range(20):
        chosen = torch.cat(
            [
                members[torch.randperm(len(members), generator=generator)[:5]]
                for members in ((bank_labels == c).nonzero().squeeze(1) for c in range(10))
            ]
        )
        probe = LogisticRegression(max_iter=1000).fit(bank[chosen].numpy(), bank_labels[chosen].numpy())
        shots.append(100 * float(probe.score(queries.numpy(), query_labels.numpy())))
    return knn, statistics.mean(shots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain_dino.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("extra", nargs="*", help="arguments for the training command, after --")
    args = parser.parse_args()

    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "main.py"), "fit", "--config", str(ROOT / args.config)]
            command += ["--seed_everything", str(seed), "--run_name", "run", *args.extra]
            started = time.monotonic()
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            seconds = time.monotonic() - started
            if run.returncode:
                sys.exit(run.stdout[-2000:] + run.stderr[-4000:])
            checkpoint = f"{folder}/checkpoints/run/last.ckpt"
            recorded = read_file(checkpoint)[CHECKPOINT_KEY]
            config = BackboneConfig(recorded["name"], None, recorded["kwargs"])
            torch.manual_seed(seed)
            untrained = build_backbone(config)
            config.weights = checkpoint
            trained = build_backbone(config)
        img_size = recorded["kwargs"].get("img_size", 224)
        data = Digits(img_size=img_size, seed=0)
        data.setup()
        rows.append((seed, *scores(untrained, data), *scores(trained, data), seconds))
        print(f"seed {seed}: {[round(x, 1) for x in rows[-1][1:]]}", file=sys.stderr, flush=True)
    pixels = scores(None, data)

    print(f"Date {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__}")
    print(f"Command: python benchmarks/digits_dino.py {shlex.join(sys.argv[1:])}\n")
    print("| seed | untrained kNN | untrained 5-shot | DINO kNN | DINO 5-shot | seconds |\n|---|---|---|---|---|---|")
    for seed, *values, seconds in rows:
        print(f"| {seed} | " + " | ".join(f"{v:.1f}" for v in values) + f" | {seconds:.0f} |")
    print(f"\nRaw pixels: kNN {pixels[0]:.1f}, 5-shot {pixels[1]:.1f}")


if __name__ == "__main__":
    main()
