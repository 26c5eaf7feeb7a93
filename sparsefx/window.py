"""The window: the steps before an update in which the gradient of missing weights is collected (contract 6)."""

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsefx import moments
from sparsefx.kernels import masking
from sparsefx.layers import SparseLayer
from sparsefx.ranks import Ranks
from sparsefx.shards import is_sharded, mean_part_like, part, part_like


class Window:
    """Collects the gradient of missing weights and completes the optimizers' first moments with it.

    Attributes:
        length: Steps before an update in which the window is open; 0 if no rule needs the gradient.
        folds: Steps folded since the last update.
        open: Whether the next step is collected.
        stale: Whether the first moments still hold what they had before `attach`.
        partial: Whether the first moments of missing weights are this rank's share alone.
    """

    def __init__(
        self, layers: Mapping[str, SparseLayer], optimizers: Sequence[Optimizer] = (), ranks: Ranks | None = None
    ) -> None:
        self.layers = layers
        self.optimizers = list(optimizers)
        self.ranks = ranks or Ranks()
        self.length = 0
        self.folds = 0
        self.open = False
        self.stale = False
        self.partial = False
        self._fresh: set[str] = set()

    def places(self) -> dict[str, tuple[Optimizer, dict]]:
        """Optimizer and parameter group of each sparse weight that is trained, in the layers' order."""
        names = {id(layer.weight): name for name, layer in self.layers.items() if layer.weight.requires_grad}
        found = {
            names[id(parameter)]: (optimizer, group)
            for optimizer in self.optimizers
            for group, parameter in moments.members(optimizer)
            if id(parameter) in names
        }
        return {name: found[name] for name in self.layers if name in found}

    def memory(self) -> int:
        """Steps that the first moments remember."""
        return max(moments.memory(group) for _, group in self.places().values())

    def set_open(self, is_open: bool) -> None:
        """Open or close the window for the next step."""
        sharded = is_open and any(is_sharded(layer.weight) for layer in self.layers.values())
        if is_open == self.open and not sharded:  # a sharded weight may be another object at each step
            return
        if self.open and not is_open:
            self.clear_missing()
        self.open = is_open
        places = self.places() if is_open else {}
        for name, layer in self.layers.items():
            layer.collect_(name in places)
            if is_sharded(layer.weight):
                layer.runtime.__dict__["stepped"] = weakref.ref(layer.weight)
            if name not in places:
                layer.runtime.collected = None

    def note_fresh(self) -> None:
        """Note the weights that have no first moment yet."""
        self._fresh = {
            name
            for name, (optimizer, _) in self.places().items()
            if moments.first_moment(optimizer, self.layers[name].weight) is None
        }

    @torch.no_grad()
    def clear_missing(self) -> None:
        """Forget the first moment of missing weights, so that they stay at zero without being masked at each step.

        A moment from before `attach` is forgotten after the first step, not at `attach`: a resumed run loads its
        state in between.
        """
        for name, (optimizer, _) in self.places().items():
            layer = self.layers[name]
            moment = moments.first_moment(optimizer, layer.weight)
            if moment is not None:
                masking.masked_(part(moment), part_like(layer.weight_mask, layer.weight))
                layer.zero_missing_()
        self.partial = False

    def after_step(self, optimizer: Optimizer) -> None:
        """Do what follows an optimizer's step: fold, and keep missing weights at zero."""
        mine = {n: group for n, (one, group) in self.places().items() if one is optimizer} if self.open else {}
        if self.stale:
            self.clear_missing()
            self.stale = False
        zeroed = self._fold(mine, optimizer) if mine else set()
        known = moments.leaves_zeros(optimizer)
        for name in mine if known else (n for n, (one, _) in self.places().items() if one is optimizer):
            if name not in zeroed:
                self.layers[name].zero_missing_()
        if self._fresh:
            self.note_fresh()

    @torch.no_grad()
    def _fold(self, mine: Mapping[str, dict], optimizer: Optimizer) -> set[str]:
        """Complete the first moments at missing weights with the gradients collected for them, and zero these weights.

        Across ranks each folds its own gradient: the rule is linear, so the mean that `reduce` takes before an update
        is what folding the mean of every step would have given. Only the scale is agreed on at each step.

        Args:
            mine: Parameter group by name of the optimizer's sparse weights.
        Returns:
            Names of the layers that had one.
        """
        ready: dict[str, tuple[dict, Tensor, Tensor]] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, group in mine.items():
            layer = self.layers[name]
            weight, collected = layer.weight, self._collected(layer)
            grad, moment = weight.grad, moments.first_moment(optimizer, weight)
            if grad is not None and collected is not None and moment is not None:
                ready[name] = group, collected, part(moment)
                pairs.append((collected, part(grad).detach().to(collected.dtype)))
        products = self.ranks.mean_products(dict(zip(ready, masking.products(pairs), strict=True)), list(mine))
        whole = moments.scale_seen([sum(column) for column in zip(*products.values(), strict=True)], 1.0)
        folds = []
        for name, (group, collected, moment) in ready.items():
            layer = self.layers[name]
            weight, seen = layer.weight, moments.scale_seen(products[name], whole)
            mask = part_like(layer.weight_mask, weight)
            alpha = moments.folded(group, first=name in self._fresh)
            folds.append(masking.Fold(moment, collected, part(weight), mask, seen, alpha))
        masking.fold_missing_(folds)
        replicated = any(not is_sharded(self.layers[name].weight) for name in mine)
        self.partial = self.partial or (replicated and self.ranks.several)
        return set(ready)

    def _collected(self, layer: SparseLayer) -> Tensor | None:
        """What has been collected for a layer; of a sharded one, this rank's part of the mean over the ranks."""
        collected = layer.runtime.collected
        if not is_sharded(layer.weight):
            return collected
        if collected is None:
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            collected = torch.zeros(layer.weight.shape, dtype=dtype, device=layer.weight_mask.device)
        return mean_part_like(collected, layer.weight)

    @torch.no_grad()
    def reduce(self) -> None:
        """Average the first moments of missing weights over the ranks: once before an update, not at each step."""
        if not self.partial:
            return
        for name, (optimizer, _) in self.places().items():
            layer = self.layers[name]
            moment = moments.first_moment(optimizer, layer.weight)
            if moment is not None and not is_sharded(moment):
                mean = self.ranks.mean(moment.masked_fill(layer.weight_mask, 0))
                torch.where(layer.weight_mask, moment, mean, out=moment)
        self.partial = False
