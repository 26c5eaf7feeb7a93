"""From masks to executable plans: candidates, measurement, choice, and re-planning as masks change (contracts 7, 9)."""

import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparsefx import choices
from sparsefx.errors import BackendWarning
from sparsefx.graph.regions import DENSE as DENSE_GRAPH
from sparsefx.graph.regions import JOINED, LAYERS
from sparsefx.graph.regions import SPARSE as SPARSE_GRAPH
from sparsefx.kernels.blocked import CONVERTED_DENSE, Converted
from sparsefx.kernels.compaction import Compaction
from sparsefx.kernels.cpu.build import CompilerUnavailable
from sparsefx.kernels.reference import DENSE
from sparsefx.kernels.runtime import Backend, Runtime, dense_for
from sparsefx.kernels.sparse_cpu import SparseCpu
from sparsefx.kernels.spec import ConvSpec, is_channels_last
from sparsefx.layers import SparseLayer, SparseLinear, owners
from sparsefx.plan import Key, Plan, buckets

PASSES: tuple[str, ...] = ("fprop", "dgrad", "wgrad")
_MARGIN = 0.97
"""Another backend must take at most this share of the dense time, so that noise does not decide."""
_SPARSE_ENOUGH = 0.5
"""Sparse kernels are a candidate up to this density; above it dense ones win unless a layer is thin."""
_THIN = 16
"""Of a layer with fewer input or output channels dense kernels, which block them by so many, do mostly nothing."""
_REPEATS, _ENOUGH = 5, 0.002
"""Rounds of a measurement and its seconds, both at least."""
_HOPELESS, _LONG, _SURE = 1.5, 0.002, 2
"""A candidate that takes so much longer than another is not run again: where all take so many seconds, after so many
rounds, for one may have been disturbed."""
_CLEAR = 1.5
"""A new mask is not measured where times of an old one foresee dense and sparse kernels this far apart."""


def sparse_kernels(device: torch.device) -> Any:
    """The backend class with sparse kernels for a device, None where there is none."""
    if device.type != "cuda":
        return SparseCpu
    if find_spec("triton") is None:
        return None
    from sparsefx.kernels.sparse_gpu import SparseGpu

    return SparseGpu


BACKENDS: dict[str, Callable[[Tensor, ConvSpec | None], Backend]] = {
    "dense": lambda mask, spec: DENSE,
    "compaction": Compaction,
    "sparse": lambda mask, spec: sparse_kernels(mask.device)(mask, spec),
}


class Specializer:
    """Plans and backend choices of one model.

    Attributes:
        table: Measured choices by layer geometry, call and live channels; saved and replayed (contract 9).
        rebuilds: How often each layer's plan was built.
        seconds: Time spent building plans and measuring.
        missing: Why the CPU kernels cannot be built; empty if they can.
        generation: How often a table was loaded.
        identity: Of the model, for choices between its graphs that are kept on disk.
        graph: Name of the graph that the latest call ran.
        settle: Called before a plan is built anew, to put the masks of an averaged copy right.
    """

    def __init__(self, identity: str = "") -> None:
        self.identity = identity
        self.graph = LAYERS
        self.generation = 0
        self.table: dict[str, str] = {}
        self.rebuilds: dict[str, int] = {}
        self.seconds = 0.0
        self.missing = ""
        self.settle: Callable[[], None] = _nothing
        self._plans: dict[int, Plan] = {}
        self._calls: dict[int, dict[Key, ConvSpec | None]] = {}
        self._times: dict[str, tuple[int, dict[str, float]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "table": dict(self.table),
            "rebuilds": {},
            "seconds": 0.0,
            "_plans": {},
            "_calls": {},
            "_times": {},
            "settle": _nothing,
        }

    def adopt(self, layer: SparseLayer) -> None:
        """Choose the layer's backends from now on."""
        layer.runtime.choose = _Chooser(self, layer.runtime)

    def plan(self, layer: SparseLayer) -> Plan:
        """The layer's plan, rebuilt if its mask changed."""
        return self._plan(layer.runtime, layer.weight_mask, layer)

    def backends(self, layer: SparseLayer) -> dict[str, str]:
        """Backend of each pass as last called; dense where a pass has not run."""
        plan = self._plans.get(layer.handle)
        chosen = dict.fromkeys(PASSES, "dense")
        if self._runs_sparse(layer):
            return dict.fromkeys(PASSES, "sparse")
        if plan is not None and self.graph not in (DENSE_GRAPH, JOINED):
            chosen.update({key[0]: name for key, name in plan.choices.items()})
            chosen.update({kind: plan.choices[key] for kind, key in plan.running.items()})
        return chosen

    def _runs_sparse(self, layer: SparseLayer) -> bool:
        """Whether the graph that runs has sparse kernels in every pass of a layer."""
        return self.graph == SPARSE_GRAPH and isinstance(layer, SparseLinear) and not layer.full

    def calls(self, layer: SparseLayer, backend: str) -> list[tuple[str, torch.Size, ConvSpec | None]]:
        """Pass, shape of the input and geometry of the calls that run on a backend."""
        plan = self.plan(layer)
        seen = self._calls.get(layer.handle, {})
        return [(key[0], torch.Size(key[1]), spec) for key, spec in seen.items() if plan.choices.get(key) == backend]

    def respecialize(self, layers: list[SparseLayer]) -> None:
        """Rebuild the plans of layers whose masks changed, and choose again for the latest call of each pass."""
        for layer in layers:
            latest = self._plans[layer.handle].running if layer.handle in self._plans else {}
            plan = self.plan(layer)
            if self._runs_sparse(layer):
                continue
            start = time.perf_counter()
            for kind, key in latest.items():
                spec = self._calls[layer.handle][key]
                plan.running[kind] = key
                if key not in plan.choices:
                    plan.choices[key] = self._choose(plan, key, spec, plan.mask.float(), None)
            self.seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """The choices and the machine they were measured on."""
        return {"machine": machine(), "table": tuple(self.table.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replay saved choices; those of another machine are dropped and measured again, as all are on request."""
        same = state["machine"] == machine() and choices.mode() != "measure"
        if state["machine"] != machine() and state["table"]:
            warnings.warn(
                f"backend choices: expected those of {machine()}, got those of another machine ({state['machine']}); "
                "they are measured again, and results may differ in the last bits",
                BackendWarning,
                stacklevel=3,
            )
        self.table = dict(state["table"]) if same else {}
        self.generation += 1
        self._plans.clear()

    def backend(
        self,
        runtime: Runtime,
        kind: str,
        spec: ConvSpec | None,
        x: Tensor,
        grad: Tensor | None,
        weight: Tensor,
        mask: Tensor,
    ) -> Backend:
        """The backend for one pass of one call."""
        plan = self._plan(runtime, mask, None, look=kind == "fprop" and mask.is_cpu)
        key = (kind, x.shape, x.dtype, "innermost" if spec is not None and spec.images else _format(x))
        place = key if spec is None else (*key, spec.key)
        ready = plan.ready.get(place)
        if ready is not None and not x.is_cuda:
            plan.running[kind] = key
            return ready
        name = plan.choices.get(key)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            # A captured graph outlives the mask: it may hold dense kernels and those whose lists change in place.
            kept = ("sparse", spec.key if spec else None) in plan.backends
            return self._backend(plan, "sparse" if name == "sparse" and kept else "dense", spec)
        if name is None:
            self._calls.setdefault(runtime.handle, {})[key] = spec
            start = time.perf_counter()
            name = plan.choices[key] = self._choose(plan, key, spec, weight, (x, grad))
            self.seconds += time.perf_counter() - start
        runtime.dense = runtime.dense or (kind == "fprop" and name == "dense")
        plan.running[kind] = key
        plan.ready[place] = ready = self._backend(plan, name, spec)
        return ready

    def choose_graph(self, key: tuple, calls: dict[str, Callable[[], Any]]) -> str:
        """Name of the fastest of several equal graphs, from the table or by measuring them."""
        entry = repr((key, tuple(calls), torch.get_num_threads()))
        known = self._known(entry, calls, f"{self.identity} ")
        if known is None:
            start = time.perf_counter()
            device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
            times = dict(zip(calls, interleaved(list(calls.values()), device), strict=True))
            fastest = min(times, key=lambda name: times[name] * (_MARGIN if name == DENSE_GRAPH else 1.0))
            known = self._keep(entry, fastest, f"{self.identity} ")
            self.seconds += time.perf_counter() - start
        return known

    def _known(self, entry: str, names: Iterable[str], prefix: str = "") -> str | None:
        """The choice among `names` for an entry: this model's, else the one on disk."""
        found = self.table.get(entry)
        if found is None or found not in names:
            found = choices.known(prefix + entry)
        if found is None or found not in names:
            return None
        self.table[entry] = found
        return found

    def _keep(self, entry: str, choice: str, prefix: str = "") -> str:
        self.table[entry] = choice
        choices.keep(prefix + entry, choice)
        return choice

    def _plan(self, runtime: Runtime, mask: Tensor, layer: SparseLayer | None, look: bool = True) -> Plan:
        plan = self._plans.get(runtime.handle)
        if plan is None or plan.stale(mask, look):
            self.settle()
            start = time.perf_counter()
            layer = layer or owners(runtime)[0]
            fresh = Plan(mask, layer.transposed, getattr(layer, "groups", 1))
            if plan is not None and plan.mask.device == mask.device:
                fresh.keep(plan.backends)
            plan = self._plans[runtime.handle] = fresh
            runtime.full, runtime.dense = fresh.full, False
            self.rebuilds[runtime.name] = self.rebuilds.get(runtime.name, 0) + 1
            self.seconds += time.perf_counter() - start
        return plan

    def _backend(self, plan: Plan, name: str, spec: ConvSpec | None) -> Backend:
        key = (name, spec.key if spec else None)
        if key not in plan.backends:
            plan.backends[key] = BACKENDS[name](plan.mask, spec)
        if spec is None or not spec.images or name == "sparse":
            return plan.backends[key]
        return CONVERTED_DENSE if name == "dense" else Converted(plan.backends[key])

    def _candidates(self, plan: Plan, spec: ConvSpec | None, x: Tensor) -> list[str]:
        """Names of the backends that may run a call, dense first."""
        names = ["dense"]
        if plan.compacts:
            names.append("compaction")
        kernels = sparse_kernels(x.device)
        few = plan.nnz <= _SPARSE_ENOUGH * plan.mask.numel() or min(plan.mask.shape[:2]) < _THIN
        if few and kernels is not None and kernels.supports(spec, x, plan.mask) and self._builds(plan, spec):
            names.append("sparse")
        return names

    def _builds(self, plan: Plan, spec: ConvSpec | None) -> bool:
        """Whether the sparse kernels can be built here."""
        if self.missing and not plan.mask.is_cuda:
            return False
        try:
            self._backend(plan, "sparse", spec)
        except CompilerUnavailable as error:
            self.missing = str(error)
            warnings.warn(
                f"CPU kernels: expected a C++ compiler, got none that works ({error}); sparse layers run dense or "
                "compacted instead. Install g++ and start again",
                BackendWarning,
                stacklevel=2,
            )
            return False
        return True

    def _choose(
        self, plan: Plan, key: Key, spec: ConvSpec | None, weight: Tensor, call: tuple[Tensor, Tensor | None] | None
    ) -> str:
        """Name of the fastest candidate, from the table or by measuring them."""
        geometry = (tuple(plan.mask.shape), spec.key if spec else None)
        entry = repr((*geometry, key, plan.mask.device.type, *buckets(plan), torch.get_num_threads()))
        known = self._known(entry, BACKENDS)
        if known is not None and (known != "sparse" or self._builds(plan, spec)):
            return known
        x, grad = call if call is not None else (_sample(key, weight), None)
        names = self._candidates(plan, spec, x)
        if len(names) == 1:
            return "dense"
        kind = repr((*geometry, key, plan.mask.device.type, torch.get_num_threads()))
        chosen = self._foreseen(kind, plan.nnz, names)
        if chosen is None:
            times = self._measure(names, plan, key[0], spec, x, grad, weight.detach())
            self._times[kind] = plan.nnz, times
            chosen = min(times, key=lambda name: times[name] * (_MARGIN if name == "dense" else 1.0))
        return self._keep(entry, chosen)

    def _foreseen(self, kind: str, nnz: int, names: Sequence[str]) -> str | None:
        """What times of another mask leave no doubt about: dense ones stay, sparse ones grow at most as the weights."""
        before, times = self._times.get(kind, (0, {}))
        if not before or set(names) != {"dense", "sparse"} or times.keys() != set(names):
            return None
        growth = nnz / before
        if times["sparse"] * max(1.0, growth) * _CLEAR < times["dense"]:
            return "sparse"
        return "dense" if times["sparse"] * min(1.0, growth) > times["dense"] * _CLEAR else None

    @torch.no_grad()
    def _measure(
        self,
        names: list[str],
        plan: Plan,
        kind: str,
        spec: ConvSpec | None,
        x: Tensor,
        grad: Tensor | None,
        weight: Tensor,
    ) -> dict[str, float]:
        """Least seconds of each candidate."""
        weight = weight.to(x.dtype)
        if kind != "fprop" and grad is None:
            grad = torch.ones_like(dense_for(spec).fprop(spec, x, weight, None))

        def run(backend: Backend) -> Callable[[], Tensor]:
            if kind == "fprop" or grad is None:
                return partial(backend.fprop, spec, x, weight, None)
            if kind == "dgrad":
                return partial(backend.dgrad, spec, grad, x, weight)
            return partial(backend.wgrad, spec, grad, x, weight, plan.mask)

        times = interleaved([run(self._backend(plan, name, spec)) for name in names], x.device)
        return dict(zip(names, times, strict=True))


class GraphChoice:
    """`Specializer.choose_graph` as a model keeps it, with the generation of the table and the graph that runs."""

    def __init__(self, specializer: Specializer) -> None:
        self.specializer = specializer

    @property
    def generation(self) -> int:
        return self.specializer.generation

    @property
    def running(self) -> str:
        return self.specializer.graph

    @running.setter
    def running(self, graph: str) -> None:
        self.specializer.graph = graph

    def __call__(self, key: tuple, calls: dict[str, Callable[[], Any]]) -> str:
        return self.specializer.choose_graph(key, calls)


class _Chooser:
    """`Runtime.choose` of one layer."""

    def __init__(self, specializer: Specializer, runtime: Runtime) -> None:
        self.specializer, self.runtime = specializer, runtime

    def __call__(
        self, kind: str, spec: ConvSpec | None, x: Tensor, grad: Tensor | None, weight: Tensor, mask: Tensor
    ) -> Backend:
        return self.specializer.backend(self.runtime, kind, spec, x, grad, weight, mask)

    def sparse(self, x: Tensor, mask: Tensor) -> Backend | None:
        """The sparse kernels of a linear layer, where there are any."""
        plan = self.specializer._plan(self.runtime, mask, None, look=mask.is_cpu)
        if not SparseCpu.supports(None, x, mask):
            return None
        known = plan.backends.get(("sparse", None))
        if known is None and self.specializer._builds(plan, None):
            known = self.specializer._backend(plan, "sparse", None)
        return known

    @property
    def plan(self) -> Plan | None:
        """The plan that the latest call ran, whether or not the mask has changed since."""
        return self.specializer._plans.get(self.runtime.handle)

    def settled(self, kind: str, spec: ConvSpec, shape: torch.Size, dtype: torch.dtype) -> Backend | None:
        """The backend of one pass on batch-innermost activations, if it has been chosen."""
        name = None if self.plan is None else self.plan.choices.get((kind, shape, dtype, "innermost"))
        return None if name is None or self.plan is None else self.specializer._backend(self.plan, name, spec)

    def misses_none(self, mask: Tensor) -> bool:
        """Whether no weight is missing."""
        return self.specializer._plan(self.runtime, mask, None, look=mask.is_cpu).full

    def runs_dense(self, layer: SparseLayer, x: Tensor) -> bool:
        """Whether a linear layer's call runs dense kernels in every pass, and a hook masks the weight's gradient."""
        mask = layer.weight_mask
        plan = self.specializer._plan(self.runtime, mask, layer, look=mask.is_cpu)
        call = (x.shape, x.dtype, _format(x))
        fprop, dgrad, wgrad = (plan.choices.get((kind, *call)) for kind in PASSES)
        trained = torch.is_grad_enabled()
        return fprop == "dense" and (not trained or (wgrad == "dense" == (dgrad or "dense") and layer.masks_gradient))


def _nothing() -> None:
    pass


def plan_of(layer: SparseLayer) -> Plan:
    """The layer's plan as its last forward verified it, without another look at the mask's contents."""
    chooser = layer.runtime.choose
    assert isinstance(chooser, _Chooser)
    return chooser.specializer._plan(layer.runtime, layer.weight_mask, layer, look=False)


def interleaved(calls: list[Callable[[], Any]], device: torch.device) -> list[float]:
    """Least seconds of each call, run in turn so that drift of the machine hits all alike; slow ones less often.

    Noise only adds, and a burst of it can be longer than all rounds of a short call.
    """

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for call in calls:
        timed(call)
    least = [math.inf] * len(calls)
    running = set(range(len(calls)))
    start, rounds = time.perf_counter(), 0
    while not rounds or (len(running) > 1 and (rounds < _REPEATS or time.perf_counter() - start < _ENOUGH)):
        for i in sorted(running):
            least[i] = min(least[i], timed(calls[i]))
        rounds += 1
        if rounds >= (_SURE if min(least) >= _LONG else _REPEATS):
            running = {i for i in running if least[i] <= _HOPELESS * min(least)}
    return least


def machine() -> str:
    """What a measured choice depends on beside the call."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no gpu"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {gpu} torch {torch.__version__}"


def _sample(key: Key, weight: Tensor) -> Tensor:
    """An input like those of a call seen before; the global random state is not ours to move."""
    _, shape, dtype, layout = key
    x = torch.ones(shape, device=weight.device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def _format(x: Tensor) -> str:
    return "channels_last" if is_channels_last(x) else "contiguous"
