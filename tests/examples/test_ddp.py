"""The plain torchrun example: trains, and goes on with another number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def epochs(root: Path, command: list[str], checkpoint: Path, *options: str, **environment: str) -> list[tuple]:
    """Number and loss of each epoch that a run prints."""
    script = [str(root / "examples" / "ddp.py"), "--epochs=3", f"--checkpoint={checkpoint}", *options]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [*command, *script], env={**os.environ, **own}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [(int(line.split()[1]), float(line.split()[3])) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
def test_two_processes_train_and_one_goes_on(root: Path, tmp_path: Path) -> None:
    first = epochs(root, TORCHRUN, tmp_path / "ddp.pt", "--until=1")
    second = epochs(root, [sys.executable], tmp_path / "ddp.pt", **ALONE)
    assert [number for number, _ in first + second] == [0, 1, 2]
    assert second[-1][1] < 0.8 * first[0][1]
