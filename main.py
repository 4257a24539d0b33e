"""Entry point: `python main.py fit --config configs/pretrain_dino.yaml`."""

from vil_lightning.cli import main

if __name__ == "__main__":
    main()
