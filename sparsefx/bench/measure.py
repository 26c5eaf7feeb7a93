"""Interleaved timing, and the average of a training step over an update interval."""

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsefx.bench.settings import INTERVAL
from sparsefx.bench.trainers import Trainer

Clock = Callable[[], float]


RARELY = 4
"""Rounds to one of a call that is timed rarely."""
TURN = 0.05
"""Seconds that a call is repeated for in its turn. A training loop runs one network's steps one after the other: a step
of a millisecond that always comes after other networks' steps would be timed on caches that they have filled."""


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Clock = time.perf_counter,
    rare: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of each call, by name: in every round each has a turn, so that drift of the machine hits all alike.

    The order is drawn anew for each round: a call that always came after the same other would always find the caches
    and the memory as that one leaves them. A turn is one call, or the mean of as many as `TURN` seconds hold.

    Args:
        rare: Names of calls that run in every fourth round only, from the first on.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for round_ in range(rounds):
        turns = [name for name in calls if name not in rare or round_ % RARELY == 0]
        for name in order.sample(turns, len(turns)):
            call = calls[name]
            start, count, seconds = clock(), 0, 0.0
            while not count or seconds + seconds / count <= TURN:
                call()
                count, seconds = count + 1, clock() - start
            times[name].append(seconds / count)
    return times


def ms(times: Sequence[float]) -> dict[str, float]:
    """Median, quartile distance over median, and number of samples of some seconds, in milliseconds."""
    middle = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [middle] * 3
    return {"ms": middle * 1e3, "spread": (quartiles[2] - quartiles[0]) / middle, "samples": len(times)}


@dataclass(frozen=True)
class Amortized:
    """A sparse training step, averaged over an update interval; milliseconds.

    Attributes:
        outside, inside: A step outside the window of the dense gradient, and one inside.
        update: Prune, redistribute, regrow and re-specialize, once.
        rebuild: What the first step after an update takes more than others, for its new lists.
        window: Steps inside the window.
        step: The average.
    """

    outside: float
    inside: float
    update: float
    rebuild: float
    window: int
    interval: int
    step: float

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def amortize(
    outside: Sequence[float],
    inside: Sequence[float],
    changes: "UpdateTimes | None",
    window: int,
    interval: int = INTERVAL,
) -> Amortized:
    """Average a step over an interval with one window and one update.

    Args:
        outside: Seconds of steps outside the window.
        inside: Of steps inside.
        changes: Of updates; None where masks never move, as at density 1.
        window: Steps inside the window in each interval.
    Raises:
        ValueError: no update was timed.
    """
    out = 1e3 * statistics.median(outside)
    if changes is None:
        return Amortized(out, out, 0.0, 0.0, 0, interval, out)
    if not changes.updates or not changes.after:
        raise ValueError("amortize: expected times of an update and of the step after it, got none; take more steps")
    within, update, after, settled = (
        1e3 * statistics.median(times) for times in (inside, changes.updates, changes.after, changes.steps)
    )
    rebuild = max(0.0, after - settled)
    window = min(window, interval)
    total = (interval - window) * out + window * within + update + rebuild
    return Amortized(out, within, update, rebuild, window, interval, total / interval)


class UpdateTimes:
    """Sorts the times of a trainer that updates often.

    Attributes:
        steps: Seconds of its steps, without the update where there was one.
        updates: Seconds of its updates.
        after: Seconds of the steps that follow an update.
    """

    def __init__(self, trainer: Trainer, clock: Clock = time.perf_counter) -> None:
        self.trainer, self.clock = trainer, clock
        self.steps: list[float] = []
        self.updates: list[float] = []
        self.after: list[float] = []
        self._fresh = False

    def step(self) -> None:
        """Take a step and keep its times."""
        before = len(self.trainer.history)
        start = self.clock()
        self.trainer.step()
        seconds = self.clock() - start
        updated = len(self.trainer.history) > before
        if updated:
            update = self.trainer.history[-1]["seconds"]
            self.updates.append(update)
            seconds -= update
        (self.after if self._fresh else self.steps).append(seconds)
        self._fresh = updated
