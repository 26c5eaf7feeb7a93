"""When masks change: the optimizer hook, updates, history and state."""

import copy
import time
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from sparsefx import exchange, moments
from sparsefx.algorithms import resolve
from sparsefx.algorithms.sparse_momentum import SparseMomentum
from sparsefx.config import Granularity
from sparsefx.errors import CheckpointError, SchedulerError, UpdateWarning
from sparsefx.layers import SparseLayer
from sparsefx.masks import Units, target_count
from sparsefx.ranks import Ranks
from sparsefx.shards import is_sharded
from sparsefx.specialize import Specializer
from sparsefx.update import LayerState, update_masks
from sparsefx.window import Window


class Scheduler:
    """Sparse momentum bound to a model, as `model.scheduler`.

    Attributes:
        config: The algorithm.
        density: Fraction of weights that exist.
        step: Optimizer steps taken since `attach`.
        history: One row an update: `step`, `prune_rate`, `seconds`, `skipped` (None or why), and `layers`, by weight
            name: `nnz`, `density`, `removed`, `grown`, `empty_in`, `empty_out`, `backends`.
        specializer: Plans and backend choices.
        window: What collects the gradient of missing weights.
    """

    def __init__(
        self,
        config: SparseMomentum,
        layers: dict[str, SparseLayer],
        granularity: Granularity,
        density: float,
        seed: int,
        specializer: Specializer,
    ) -> None:
        self.config = config
        self.layers = layers
        self.granularity = granularity
        self.density = density
        self.seed = seed
        self.specializer = specializer
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.units = {
            name: Units.of(layer.weight.shape, granularity, layer.transposed) for name, layer in layers.items()
        }
        self.target = target_count(density, sum(layer.weight_mask.numel() for layer in layers.values()))
        self._source: weakref.ref[Scheduler] | None = None
        self._rules = {
            kind: resolve(kind, getattr(config, kind)) for kind in ("decay", "prune", "redistribute", "grow")
        }
        self._detach_state()

    def _detach_state(self) -> None:
        self._optimizers: list[Optimizer] = []
        self._handles: list[Any] = []
        self._counts: list[int] = []
        self._steps_per_update = 0
        self._total_steps = 0
        self.window = Window(self.layers)

    @property
    def attached(self) -> bool:
        """Whether `attach` has been called."""
        return self._total_steps > 0

    @property
    def prune_rate(self) -> float:
        """Share of each layer's weights that an update would remove now."""
        if not self.attached:
            return self.config.prune_rate
        return self._rules["decay"](self.config.prune_rate, self.step, self._total_steps)

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        steps_per_update: int,
        total_steps: int,
        process_group: Any = None,
    ) -> None:
        """Let the optimizer's steps drive the updates; nothing else in the training loop changes.

        Args:
            optimizer: The one that holds the sparse weights, or several. A step counts when each has taken it.
            steps_per_update: Optimizer steps between updates; the paper's is one epoch.
            total_steps: Optimizer steps of the whole training, over which the prune rate falls. No update comes at
                or after the last.
            process_group: The ranks that train this model together, each of which calls `attach`; None is the default
                group, where torch.distributed is initialized.
        Raises:
            SchedulerError: an optimizer without a usable first moment or without sparse weights, numbers below 1, or
                a second `attach`.
            DistributedError: the masks differ between ranks.
        """
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if self._handles or self._optimizers:
            raise SchedulerError(
                "attach: expected a scheduler not yet attached, got a second call; call detach() first"
            )
        for name, value in (("steps_per_update", steps_per_update), ("total_steps", total_steps)):
            if not isinstance(value, int) or value < 1:
                raise SchedulerError(f"{name}: expected a positive number of optimizer steps, got {value!r}")
        if steps_per_update > total_steps:
            raise SchedulerError(
                f"steps_per_update: expected at most total_steps ({total_steps}), got {steps_per_update}; "
                "both count optimizer steps"
            )
        if not optimizers:
            raise SchedulerError("attach: expected an optimizer, got none; pass the one that steps the model")
        if self._needs_moment:
            for one in optimizers:
                moments.check_family(one)
        window = Window(self.layers, optimizers, Ranks(process_group))
        places = window.places()
        for one in optimizers:
            if not any(owner is one for owner, _ in places.values()):
                raise SchedulerError(
                    f"attach: expected an optimizer with sparse weights, got {type(one).__name__} without any; "
                    "build it from model.parameters() and attach that one (for fp32 master weights, keep the model in "
                    "fp32 and run it under autocast)"
                )
        window.ranks.agree(
            {name: [layer.weight_mask] for name, layer in self.layers.items()},
            "attach",
            "sparsify with the same seed, and load the same checkpoint, on every rank",
        )
        self._optimizers, self.window = optimizers, window
        self._steps_per_update, self._total_steps = steps_per_update, total_steps
        self._counts = [self.step] * len(optimizers)
        if all(int(layer.weight_mask.sum()) == layer.weight_mask.numel() for layer in self.layers.values()):
            return
        outside = [n for n, layer in self.layers.items() if n not in places and layer.weight.requires_grad]
        if outside:
            warnings.warn(
                f"{', '.join(outside)}: expected in an attached optimizer, found in none; their masks stay as they are",
                UpdateWarning,
                stacklevel=2,
            )
        window.length = self._window_length(window)
        me: weakref.ref[Scheduler] = weakref.ref(self)
        self._handles = [
            one.register_step_post_hook(partial(_after_step, me, index)) for index, one in enumerate(optimizers)
        ]
        window.stale = True
        window.note_fresh()
        self._set_window()

    def detach(self) -> None:
        """Remove the hooks; the masks stay as they are."""
        for handle in self._handles:
            handle.remove()
        self.window.set_open(False)
        self._detach_state()

    @property
    def _always(self) -> bool:
        return self.config.dense_grad_window == "always"

    @property
    def _needs_moment(self) -> bool:
        return self._rules["grow"].needs_first_moment or self.config.redistribute == "momentum"

    def _window_length(self, window: Window) -> int:
        if not self._rules["grow"].needs_first_moment:
            return 0
        if self._always:
            return self._steps_per_update
        asked = self.config.dense_grad_window
        return min(asked if isinstance(asked, int) else window.memory(), self._steps_per_update)

    @property
    def _next_update(self) -> int:
        return (self.step // self._steps_per_update + 1) * self._steps_per_update

    def _set_window(self) -> None:
        """Open or close the window for the next step."""
        coming = self._next_update < self._total_steps
        self.window.set_open(coming and self._next_update - self.step <= self.window.length)

    def _on_step(self, index: int) -> None:
        """Do what follows an optimizer's step: fold, count, and update when it is time."""
        optimizer = self._optimizers[index]
        if moments.skipped(optimizer):
            return
        self.window.after_step(optimizer)
        self._counts[index] += 1
        if min(self._counts) == self.step:
            return
        self.step = min(self._counts)
        self.window.folds += self.window.open
        if self.step % self._steps_per_update == 0 and self.step < self._total_steps:
            self.update()
        else:
            self._set_window()

    def update(self) -> None:
        """Prune, redistribute and regrow once, now.

        Raises:
            SchedulerError: not attached, or the window of the dense gradient is not complete.
            DistributedError: a rank is gone, or masks and weights are not the same on all.
        """
        if not self.attached:
            raise SchedulerError("update: expected an attached scheduler, got none; call attach(optimizer, ...) first")
        window = self.window
        needed = min(1, window.length) if self._always else window.length
        if window.folds < needed:
            raise SchedulerError(
                f"update: expected a complete window of {needed} steps with the dense gradient, got "
                f'{window.folds}; let the steps drive the updates, or use dense_grad_window="always"'
            )
        start = time.perf_counter()
        spent = self.specializer.seconds
        rate = self.prune_rate
        window.reduce()
        states = exchange.read(window, self.units, self._needs_moment)
        reason = next((state.problem for state in states if state.problem), None)
        changed: dict[str, tuple[int, int]] = {}
        if reason is not None:
            warnings.warn(f"{reason}; the update at step {self.step} is skipped", UpdateWarning, stacklevel=2)
        elif states:
            changed = self._apply(states, rate)
        if not self._always:
            window.folds = 0
            window.clear_missing()
        self._set_window()
        window.ranks.agree(
            {
                name: [layer.weight_mask, layer.weight_mask if is_sharded(layer.weight) else layer.weight]
                for name, layer in self.layers.items()
            },
            f"update at step {self.step}",
            "start from a checkpoint, and let nothing but the optimizer write weights",
        )
        self.specializer.respecialize([self.layers[n] for n, counts in changed.items() if any(counts)])
        self.history.append(
            {
                "step": self.step,
                "prune_rate": rate,
                "seconds": time.perf_counter() - start,
                "specialize_seconds": self.specializer.seconds - spent,
                "skipped": reason,
                "layers": {
                    name: exchange.row(self.specializer, layer, *changed.get(name, (0, 0)))
                    for name, layer in self.layers.items()
                },
            }
        )

    def _apply(self, states: list[LayerState], rate: float) -> dict[str, tuple[int, int]]:
        """Compute the new masks and put them in place; numbers of weights removed and grown by layer."""
        names = {s.name for s in states}
        fixed = sum(self.specializer.plan(layer).nnz for n, layer in self.layers.items() if n not in names)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        changes = update_masks(
            states,
            rate,
            self.target - fixed,
            self._rules["prune"],
            self._rules["redistribute"],
            self._rules["grow"],
            generator,
        )
        exchange.put_(self.window, states, changes)
        return {s.name: (c.removed, c.grown) for s, c in zip(states, changes, strict=True)}

    def synchronize(self) -> None:
        """Give every rank the mean of what the ranks have collected so far; all of them call it.

        A checkpoint that one rank saves inside a window needs it; elsewhere it does nothing.
        """
        self.window.reduce()

    def settle(self) -> None:
        """Put a copy's masks and missing weights right after averaging (`torch.optim.swa_utils.AveragedModel`).

        An average has weights where the source had any before, and with `use_buffers=True` the union of its masks. It
        then holds the source's current masks. Called by whatever reads the masks of a copy.
        """
        source = self._source and self._source()
        if source is None or self.attached:
            return
        exchange.settle_(self.layers, source.layers)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the model's and the optimizer's state; plain values only.

        What grows is in tuples: torch.distributed.checkpoint takes lists and dicts apart by the keys of the state that
        it loads into.
        """
        if self.window.partial:
            warnings.warn(
                f"scheduler: expected a state of all ranks, got rank {self.window.ranks.rank}'s share of the gradient "
                "of missing weights; let all ranks call model.scheduler.synchronize() before one saves",
                UpdateWarning,
                stacklevel=2,
            )
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "shapes": {name: list(layer.weight_mask.shape) for name, layer in self.layers.items()},
            "density": self.density,
            "granularity": [self.granularity.kind, self.granularity.rows, self.granularity.columns],
            "prune_rate": self.config.prune_rate,
            "seed": self.seed,
            "step": self.step,
            "counts": list(self._counts),
            "folds": self.window.folds,
            "steps_per_update": self._steps_per_update,
            "total_steps": self._total_steps,
            "history": tuple(copy.deepcopy(self.history)),
            "specializer": self.specializer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume: call it after `attach`, and after loading the model's and the optimizer's state.

        Raises:
            CheckpointError: the state is of other layers or of another density, granularity or prune rate; nothing is
                changed.
        """
        mine = self._state()
        for key in ("density", "granularity", "prune_rate", "shapes"):
            if state[key] != mine[key]:
                raise CheckpointError(
                    f"scheduler: expected {key} {mine[key]!r}, got {state[key]!r}; sparsify with the saved value"
                )
        for key in ("steps_per_update", "total_steps"):
            if self.attached and state[key] and state[key] != mine[key]:
                raise CheckpointError(
                    f"scheduler: expected {key} {mine[key]}, got {state[key]}; attach with the saved value"
                )
        self.seed = state["seed"]
        self.step = state["step"]
        self.window.folds = state["folds"]
        self.window.stale = self.window.partial = False
        self.history = [copy.deepcopy(row) for row in state["history"]]
        self.specializer.load_state_dict(state["specializer"])
        if self._optimizers:
            self._counts = list(state["counts"]) or [self.step] * len(self._optimizers)
            if self._handles:
                self.window.note_fresh()
                self._set_window()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry an unattached scheduler: the optimizer is not theirs."""
        state = self.__dict__.copy()
        for name in ("_optimizers", "_handles", "_counts", "window"):
            del state[name]
        state.update(_source=None, step=0, _steps_per_update=0, _total_steps=0, history=list(self.history))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._detach_state()

    def __deepcopy__(self, memo: dict) -> "Scheduler":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other._source = weakref.ref(self)
        return other

    def rebind(self, layers: dict[str, SparseLayer]) -> None:
        """Drive these layers: the ones of a copied or unpickled model."""
        self.layers = self.window.layers = layers
        me: weakref.ref[Scheduler] = weakref.ref(self)
        self.specializer.settle = partial(_settle, me)
        for layer in layers.values():
            self.specializer.adopt(layer)


def _after_step(scheduler: "weakref.ref[Scheduler]", index: int, *_: Any) -> None:
    found = scheduler()
    if found is not None:
        found._on_step(index)


def _settle(scheduler: "weakref.ref[Scheduler]") -> None:
    found = scheduler()
    if found is not None:
        found.settle()
