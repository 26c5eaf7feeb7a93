"""The rules of dynamic sparse training, as plain functions registered by name.

| kind | signature | built in |
|---|---|---|
| `prune` | `(weight, mask, k) -> mask` | `magnitude` |
| `redistribute` | `(stats) -> shares` | `momentum`, `none`, `nonzero` |
| `grow` | `(score, mask, k) -> mask` | `momentum`, `random` |
| `decay` | `(prune_rate, step, total_steps) -> prune_rate` | `cosine`, `linear`, `constant` |

Tensors are flat, one entry per unit (a weight, unless `granularity` says otherwise), and `k` counts units. A rule that
takes a keyword `generator` receives a seeded `torch.Generator`.
"""

from sparsefx.algorithms import decay, grow, prune, redistribute
from sparsefx.algorithms.redistribute import LayerStats
from sparsefx.algorithms.registry import Rule, register, resolve, rules
from sparsefx.algorithms.sparse_momentum import SparseMomentum

__all__ = [
    "LayerStats",
    "Rule",
    "SparseMomentum",
    "decay",
    "grow",
    "prune",
    "redistribute",
    "register",
    "resolve",
    "rules",
]
