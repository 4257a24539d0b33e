"""The Triton kernels, compiled for GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
KERNELS = ["gates", "states", "forward", "denominator_grad", "query_grad", "states_grad", "key_value_grad"]


def table(*args: str) -> list[list[str]]:
    """The rows that the script prints. In a process of its own: in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *args]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith(("| sm_", "| gfx"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_published_width__compiles_and_uses_matrix_units() -> None:
    rows = table("--targets", "sm_90", "--dtypes", "bfloat16", "--head_dims", "96")
    assert sorted(row[4] for row in rows) == sorted(KERNELS)
    for row in rows:
        registers, spilled, _, _, programs, matrix_instructions = (float(cell) for cell in row[6:])
        assert 16 <= registers <= 255
        assert spilled == 0
        assert programs >= 1
        assert (matrix_instructions > 0) == (row[4] not in ("gates", "denominator_grad"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120", "gfx90a", "gfx942"])
def test_common_gpus__every_kernel_can_be_launched(target: str) -> None:
    dtypes = ["bfloat16", "float16", "float32", "tf32"]
    rows = table("--targets", target, "--dtypes", *dtypes, "--head_dims", "24", "192", "512")
    assert sorted(row[4] for row in rows) == sorted(KERNELS * 4 * 3)
    limit = 64 if target.startswith("gfx") else 256  # registers or bytes that a thread spills
    assert all(int(row[7]) <= limit for row in rows), rows
