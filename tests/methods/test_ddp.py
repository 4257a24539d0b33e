"""Two processes with half the batch each train the same networks as one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import digits, dino, trainer

STEPS, GLOBAL_BATCH = 3, 8


def train(world_size: int, out: Path) -> None:
    """Train for a few steps and save what process 0 ends with (and process 1, to compare)."""
    torch.set_num_threads(1)
    model = dino(lr_warmup=0, final_weight_decay=0.1)
    parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    fit = trainer(out, max_steps=STEPS, max_epochs=1, **parallel)
    fit.fit(model, datamodule=digits(GLOBAL_BATCH // world_size))
    assert fit.global_step == STEPS
    assert model.global_batch_size == GLOBAL_BATCH
    torch.save(model.state_dict(), out / f"world{world_size}_rank{fit.global_rank}.pt")


@pytest.mark.timeout(120)
def test_ddp__two_processes_equal_one(tmp_path: Path) -> None:
    train(1, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"from test_ddp import train\nif __name__ == '__main__': train(2, Path({str(tmp_path)!r}))\n"
    (tmp_path / "main.py").write_text(script)
    root = Path(__file__).parents[2]
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PL_"))}
    environment = {
        **base,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
    }
    # Both started here, as a cluster would, so that none is left behind.
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "main.py")],
            env={**environment, "LOCAL_RANK": str(rank), "NODE_RANK": "0", "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)

    one = torch.load(tmp_path / "world1_rank0.pt", weights_only=True)
    two, other = (torch.load(tmp_path / f"world2_rank{rank}.pt", weights_only=True) for rank in range(2))
    start = dino().state_dict()
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert torch.equal(two[name], other[name]), f"{name} differs between the processes"
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert moved > 1e-3  # far more than what is tolerated above
