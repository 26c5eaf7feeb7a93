"""What goes wrong in long runs: killed processes, lost ranks, bad losses, full disks."""

import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import sparsefx
from sparsefx import ranks as collectives
from sparsefx import scheduler as scheduling
from sparsefx.errors import UpdateWarning
from sparsefx.window import Window
from tests.masked_dense import MOMENTUM, assert_equal_state, assert_zero_missing, batches, loss_of, net, train_step
from tests.stack import ranks
from tests.stack.test_ddp import parts, wrap

SCHEDULE = {"steps_per_update": 3, "total_steps": 30}
OPTIMIZERS = {"sgd": MOMENTUM, "adam": partial(Adam, lr=1e-3)}


def start(name: str = "sgd", window: Any = 2, **optimizer: Any) -> tuple[nn.Module, Optimizer]:
    """In float64, with every channel live, no backend is chosen by timing, so that runs agree to the bit."""
    model = sparsefx.sparsify(net(), 0.5, scheduler=sparsefx.SparseMomentum(dense_grad_window=window))
    made = OPTIMIZERS[name](model.parameters(), **optimizer)
    model.scheduler.attach(made, **SCHEDULE)
    return model, made


def save(path: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """As every checkpoint should be written: whole, beside the old one, then renamed over it."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state | {"scheduler": model.scheduler.state_dict()}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def resume(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    model.scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def train_saving(path: Path, name: str) -> None:
    torch.set_num_threads(1)
    model, optimizer = start(name)
    data = batches(20)
    for step in range(resume(path, model, optimizer), 20):
        train_step(model, optimizer, data[step])
        save(path, model, optimizer, step + 1)
    path.with_suffix(".done").touch()


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_and_resume(folder: Path, seed: int) -> tuple[int, int]:
    """One run, killed at random times until it is through; how often, and how often while it wrote a checkpoint."""
    rng, path, name = random.Random(seed), folder / "run.pt", ("sgd", "adam")[seed % 2]
    kills = writing = 0
    deadline = time.monotonic() + 100
    while not path.with_suffix(".done").exists():
        assert time.monotonic() < deadline
        process = ranks.start(train_saving, path, name)
        before = written(path)
        for _ in range(rng.randint(1, 6)):  # at least one step forward, then anywhere within a few
            while process.is_alive() and written(path) == before:
                time.sleep(0.001)
            before = written(path)
        process.join(rng.uniform(0, 0.02))
        if process.is_alive():
            process.kill()
            kills += 1
            process.join()
            writing += path.with_suffix(".part").exists()
        else:
            assert process.exitcode == 0
    model, optimizer = start(name)
    for batch in batches(20):
        train_step(model, optimizer, batch)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 20
    assert_equal_state(state["model"], dict(model.state_dict()))
    assert_equal_state(state["optimizer"], optimizer.state_dict())
    expected = model.scheduler.state_dict()
    for key in ("step", "counts", "folds", "seed"):
        assert state["scheduler"][key] == expected[key]
    rows = [row["layers"] for row in state["scheduler"]["history"]]
    assert rows == [row["layers"] for row in model.scheduler.history]
    assert len(rows) == 6
    return kills, writing


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_at_random_points_goes_on_bit_exactly(seed: int, tmp_path: Path) -> None:
    kills, _ = kill_and_resume(tmp_path, seed)
    assert kills >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_runs_killed_at_random_points_go_on_bit_exactly(tmp_path: Path) -> None:
    total = [0, 0]
    for seed in range(50):
        (tmp_path / str(seed)).mkdir()
        total = [a + b for a, b in zip(total, kill_and_resume(tmp_path / str(seed), 100 + seed), strict=True)]
    print(f"50 runs, {total[0]} kills, {total[1]} of them during a checkpoint write")
    assert total[0] >= 50
    assert total[1] >= 1


def dying_rank(rank: int, where: str, how: str) -> None:
    model = sparsefx.sparsify(net(), 0.2)
    optimizer = MOMENTUM(model.parameters())
    call = wrap(model)
    model.scheduler.attach(optimizer, **SCHEDULE)
    if how == "hangs":
        collectives.PATIENCE = 3.0

    def go(*_: Any) -> Any:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(7)
        os._exit(1)

    if rank == 1:
        setattr(*{"before": (Window, "reduce"), "during": (scheduling, "update_masks")}[where], go)
    for batch in parts(batches(4), rank, 2):
        loss_of(call, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("where", "how"), [("before", "dies"), ("during", "dies"), ("before", "hangs")])
def test_a_rank_lost_during_an_update_is_a_clear_error_on_the_others(where: str, how: str) -> None:
    alive, gone = ranks.launch(dying_rank, where, how)
    assert gone.code == (-signal.SIGKILL if how == "dies" else 1)
    assert "DistributedError: rank 0: expected all 2 ranks at a mask update, lost at least one" in alive.error
    assert "restart from the last checkpoint" in alive.error
    assert alive.seconds < (10 if how == "hangs" else 60)
    assert collectives.PATIENCE < 60


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_steps_left_out_for_a_bad_loss_leave_no_trace(bad: float) -> None:
    """The usual loop: backward, look at the loss, drop the gradients and go on."""
    model, optimizer = start()
    data = batches(11)
    good = iter(data)
    for step in range(16):
        loss = loss_of(model, (data[0][0] * bad, data[0][1]) if step in (0, 2, 6, 7, 13) else next(good))
        loss.backward()
        if loss.isfinite():
            optimizer.step()
        optimizer.zero_grad()
    assert model.scheduler.step == 11
    expected, optimizer = start()
    for batch in data:
        train_step(expected, optimizer, batch)
    assert_equal_state(copy_of(model), copy_of(expected))


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_bad_losses_that_are_stepped_on_never_move_masks() -> None:
    model, optimizer = start()
    masks = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
    for step, (x, y) in enumerate(batches(7), 1):
        loss = loss_of(model, (x, y)) * (float("nan") if step == 2 else 1.0)
        loss.backward()
        if step % 3:
            optimizer.step()
        else:
            with pytest.warns(UpdateWarning, match="finite"):
                optimizer.step()
        optimizer.zero_grad()
        assert_zero_missing(model)
    assert_equal_state(dict(sparsefx.masks(model)), masks)
    assert all("finite" in row["skipped"] for row in model.scheduler.history)


def train_on_a_full_disk(path: Path) -> None:
    torch.set_num_threads(1)
    model, optimizer = start()
    failed = 0
    for step, batch in enumerate(batches(9)):
        train_step(model, optimizer, batch)
        full = step in (3, 5)
        limit = 4096 if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save(path, model, optimizer, step + 1)
        except (OSError, RuntimeError):
            failed += full
            assert resume(path, *start()) == step
    assert failed == 2
    model_again, optimizer_again = start()
    assert resume(path, model_again, optimizer_again) == 9
    assert_equal_state(copy_of(model_again), copy_of(model))
    torch.save(copy_of(model), path.with_suffix(".state"))


def test_a_checkpoint_that_found_the_disk_full_costs_nothing_but_itself(tmp_path: Path) -> None:
    process = ranks.start(train_on_a_full_disk, tmp_path / "run.pt")
    process.join(60)
    assert process.exitcode == 0
    model, optimizer = start()
    for batch in batches(9):
        train_step(model, optimizer, batch)
    assert_equal_state(torch.load(tmp_path / "run.state"), copy_of(model))
