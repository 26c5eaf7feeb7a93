"""Interleaving, and the average of a step over an update interval, on a clock that the test winds."""

import functools
import itertools

import pytest

from sparsefx.bench.measure import TURN, UpdateTimes, amortize, interleaved, ms


class Wound:
    """A clock, and a trainer whose steps take as long as the test says."""

    def __init__(self, seconds, updates):
        self.now, self.seconds, self.updates, self.history = 0.0, list(seconds), dict(updates), []
        self.taken = 0

    def clock(self):
        return self.now

    def step(self):
        self.now += self.seconds[self.taken]
        self.taken += 1
        if self.taken in self.updates:
            self.history.append({"seconds": self.updates[self.taken]})


def timed(seconds, updates):
    trainer = Wound(seconds, updates)
    times = UpdateTimes(trainer, trainer.clock)
    for _ in seconds:
        times.step()
    return times


def test_calls_take_turns_and_their_times_are_theirs():
    order, now = [], [0.0]

    def call(name, seconds):
        order.append(name)
        now[0] += seconds

    calls = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 3.0)}
    assert interleaved(calls, 3, lambda: now[0]) == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert [sorted(order[i : i + 2]) for i in range(0, 6, 2)] == [["a", "b"]] * 3
    order.clear()
    assert interleaved(calls, 6, lambda: now[0], rare=["b"]) == {"a": [1.0] * 6, "b": [3.0] * 2}
    assert [sorted(order[:2]), order[2:5], sorted(order[5:7]), order[7:]] == [["a", "b"], ["a"] * 3, ["a", "b"], ["a"]]


def test_no_call_always_follows_the_same_other():
    order = []
    calls = {name: functools.partial(order.append, name) for name in "abc"}
    ticks = itertools.count(0.0, TURN)  # every call takes a whole turn
    interleaved(calls, 30, lambda: next(ticks))
    assert len(order) == 90
    followed = {name: {before for before, after in itertools.pairwise(order) if after == name} for name in calls}
    assert all(followed[name] >= calls.keys() - {name} for name in calls)


def test_short_calls_are_repeated_in_their_turn():
    now, taken = [0.0], []

    def call(name, seconds):
        taken.append(name)
        now[0] += seconds

    calls = {"short": lambda: call("short", TURN / 8.5), "long": lambda: call("long", TURN * 0.75)}
    times = interleaved(calls, 2, lambda: now[0])
    turns = [(name, len(list(group))) for name, group in itertools.groupby(taken)]
    assert sum(n for name, n in turns if name == "short") == 16
    assert all(n % 8 == 0 for name, n in turns if name == "short")
    assert taken.count("long") == 2
    assert times["short"] == pytest.approx([TURN / 8.5] * 2)
    assert times["long"] == pytest.approx([TURN * 0.75] * 2)


def test_times_of_updates_are_sorted():
    times = timed([1.0, 1.5, 3.0, 1.75, 1.25], {3: 2.0})
    assert times.steps == [1.0, 1.5, 1.0, 1.25]
    assert times.updates == [2.0]
    assert times.after == [1.75]


def test_the_average_counts_window_update_and_new_lists_once():
    changes = timed([0.5, 2.5, 1.0, 0.5], {2: 2.0})
    average = amortize([0.125, 0.125, 0.5], [0.25, 0.25, 1.0], changes, window=44, interval=390)
    assert (average.outside, average.inside, average.update) == (125, 250, 2000)
    assert average.rebuild == pytest.approx(500)
    assert average.step == pytest.approx((346 * 125 + 44 * 250 + 2000 + 500) / 390)


def test_a_window_longer_than_the_interval_fills_it():
    changes = timed([0.25, 2.25, 0.25], {2: 2.0})
    assert amortize([0.1], [0.25], changes, window=44, interval=4).step == pytest.approx((4 * 250 + 2000) / 4)


def test_masks_that_never_move_cost_no_update():
    assert amortize([0.1, 0.3, 0.1], (), None, window=44).step == pytest.approx(100)


def test_no_update_raises():
    with pytest.raises(ValueError, match="more steps"):
        amortize([1.0], [1.0], timed([1.0], {}), window=44)


def test_median_and_spread():
    assert ms([4.0, 1.0, 2.0, 3.0, 5.0]) == {"ms": 3000.0, "spread": 1.0, "samples": 5}
