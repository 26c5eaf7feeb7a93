"""Compile every shipped kernel and configuration ahead of time, without a GPU, and report what came out.

Run `python -m sparsefx.kernels aot`; a process of its own, because the interpreter's environment variable, once
read, keeps Triton from compiling.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsefx.kernels.gpu.config import Config, shipped_configs
from sparsefx.kernels.gpu.gather import gather_kernel, pack_kernel
from sparsefx.kernels.gpu.launch import Kernel
from sparsefx.kernels.gpu.layout import transpose_kernel
from sparsefx.kernels.gpu.plan import Geometry, blocks
from sparsefx.kernels.gpu.wgrad import sum_kernel, wgrad_kernel

TARGETS = {"sm_80": 80, "sm_90": 90}
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
GEOMETRIES = {
    "conv 3x3": Geometry("conv", (3, 3), (1, 1), (1, 1), (1, 1)),
    "conv 3x3/2": Geometry("conv", (3, 3), (2, 2), (1, 1), (1, 1)),
    "pointwise": Geometry("pointwise", (1, 1), (1, 1), (0, 0), (1, 1)),
}
_GEOMETRIES = {
    "fprop": ("conv 3x3", "pointwise"),
    "dgrad": ("conv 3x3", "conv 3x3/2"),
    "wgrad": ("conv 3x3",),
}
"""Those that a pass compiles differently; a linear layer is a pointwise one, and their input gradients are too."""
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Case:
    """One specialization: a kernel with the types of its pointers and its constants.

    `label` names the geometry and precision; `matrix` says whether the kernel holds a matrix product in half precision.
    """

    kernel: Kernel
    label: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    matrix: bool = False


@dataclass(frozen=True)
class Report:
    """What one specialization compiled to.

    Attributes:
        registers: Of a thread.
        spills: Loads and stores of local memory in the machine code.
        shared_bytes: Shared memory of a program.
        wgmma: Whether Hopper's asynchronous matrix instructions are used.
        wide_loads, loads: Loads from global memory of 16 bytes a thread, and all.
    """

    kernel: str
    label: str
    target: str
    config: str
    registers: int
    spills: int
    shared_bytes: int
    wgmma: bool
    wide_loads: int
    loads: int

    def fault(self, matrix: bool) -> str:
        """Why this must not ship; empty if it may."""
        if self.spills:
            return f"{self.spills} spills"
        if matrix and self.target == "sm_90" and not self.wgmma:
            return "no wgmma"
        if matrix and not self.wide_loads:
            return "no 16-byte loads"
        return ""


def matrix_case(kind: str, precision: str, geometry: str, config: Config, *, dense: bool = False) -> Case:
    """The specialization that a pass runs with a configuration, bias and ReLU included in the forward pass."""
    dtype, how = PRECISIONS[precision]
    activation = _POINTERS[dtype]
    half = dtype != torch.float32
    shared = {
        **GEOMETRIES[geometry].constants,
        "BATCH_VECTOR": 16,
        **blocks(config),
        "PRECISION": how,
        "UPCAST": False,
    }
    label = f"{geometry} {precision}"
    if kind == "wgrad":
        pointers = {"x_ptr": activation, "g_ptr": activation, "partial_ptr": "*fp32"}
        pointers |= dict.fromkeys(
            ("columns_ptr", "starts_ptr", "rows_ptr", "work_starts_ptr", "work_tiles_ptr"), "*i32"
        )
        constants = {**shared, "PASS": "dense_wgrad" if dense else "wgrad", "DENSE": dense}
        if dense:
            pointers["flag_ptr"] = "*i32"
        else:
            constants["flag_ptr"] = None
        return Case(wgrad_kernel, label, pointers, constants, config.warps, config.stages, half)
    pointers = {"x_ptr": activation, "w_ptr": activation, "y_ptr": activation}
    pointers |= dict.fromkeys(("columns_ptr", "starts_ptr", "rows_ptr"), "*i32")
    forward = kind == "fprop"
    constants = {**shared, "PASS": "fwd" if forward else kind, "RELU": forward, "residual_ptr": None}
    if forward:
        pointers["bias_ptr"] = "*fp32"
    else:
        constants["bias_ptr"] = None
    return Case(gather_kernel, label, pointers, constants, config.warps, config.stages, half)


def helper_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Kernels without a matrix product: packing, sums of splits, transposes."""
    activation, label = _POINTERS[dtype], str(dtype).removeprefix("torch.")
    lists = dict.fromkeys(("columns_ptr", "starts_ptr", "rows_ptr"), "*i32")
    pack = {"TAPS": 9, "BLOCK_ROWS": 64, "BLOCK_SLOTS": 32}
    yield Case(pack_kernel, label, {**lists, "weight_ptr": activation, "packed_ptr": activation}, pack)
    pointers = {"partial_ptr": "*fp32", "grad_ptr": activation, "place_ptr": "*i32", "slots_ptr": "*i32"}
    pointers["matrix_ptr"] = "*u8"
    constants = {"TAPS": 9, "BLOCK_ROWS": 64, "BLOCK": 1024}
    yield Case(sum_kernel, label, pointers, {**constants, "DENSE": False, "flag_ptr": None})
    yield Case(sum_kernel, label, {**pointers, "flag_ptr": "*i32"}, {**constants, "DENSE": True})
    yield Case(transpose_kernel, label, {"x_ptr": activation, "y_ptr": activation}, {"BLOCK": 64})


def cases() -> Iterator[Case]:
    """Everything that ships: each configuration in each type it serves, each geometry, and the helpers."""
    for precision, (dtype, _) in PRECISIONS.items():
        for kind, config in shipped_configs(dtype):
            for geometry in _GEOMETRIES[kind]:
                yield matrix_case(kind, precision, geometry, config)
            if kind == "wgrad":
                yield matrix_case(kind, precision, "conv 3x3", config, dense=True)
        if precision != "tf32":
            yield from helper_cases(dtype)


def compile_case(case: Case, target: str) -> Report:
    """Compile one specialization for one target and read its machine code.

    Raises:
        RuntimeError: in a process whose Triton interprets.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("aot: expected TRITON_INTERPRET unset, got 1; start a process without it")
    jit = case.kernel.jit
    signature, attributes = {}, {}
    for index, name in enumerate(jit.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name in case.pointers:
            signature[name] = case.pointers[name]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name in ("capacity", "outer", "inner"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(jit, signature, {k: v for k, v in case.constants.items() if k in signature}, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", TARGETS[target], 32), options=options)
    sass, usage = _disassemble(compiled.asm["cubin"])
    config = {k.removeprefix("BLOCK_").lower(): v for k, v in case.constants.items() if k.startswith("BLOCK")}
    order = {True: " rows-first", False: " rows-last"}.get(case.constants.get("ROWS_FIRST", ""), "")
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    return Report(
        kernel=case.kernel.name(case.constants),
        label=case.label,
        target=target,
        config=" ".join(f"{k}={v}" for k, v in config.items()) + f"{order} w{case.warps} s{case.stages}",
        registers=int(found.group(1)),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared_bytes=compiled.metadata.shared,
        wgmma="HGMMA" in sass and "wgmma.mma_async" in compiled.asm["ptx"],
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128", sass)),
        loads=len(re.findall(r"\b(?:LDG|LDGSTS)\b", sass)),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Machine code and resource usage of a cubin, from the tools that come with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        runs = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
        sass, usage = runs
    return sass, usage


def run(targets: list[str], wanted: Callable[[Case], bool] = lambda case: True) -> tuple[list[Report], list[str]]:
    """Compile the cases that are `wanted` for each target and print a line each.

    Returns:
        The reports, and one line for each that must not ship.
    """
    reports, faults = [], []
    with tempfile.TemporaryDirectory() as cache:
        # The user's cache may hold what another source compiled to.
        os.environ["TRITON_CACHE_DIR"] = cache
        for case in filter(wanted, cases()):
            for target in targets:
                report = compile_case(case, target)
                reports.append(report)
                fault = report.fault(case.matrix)
                print(_line(report), fault and f"FAULT: {fault}", flush=True)
                if fault:
                    faults.append(f"{report.kernel} {report.label} {target} {report.config}: {fault}")
    return reports, faults


def _line(r: Report) -> str:
    return (
        f"{r.target} {r.kernel:22s} {r.label:16s} {r.config:48s} {r.registers:3d} registers {r.spills:3d} spills "
        f"{r.shared_bytes:6d} B shared  {'wgmma' if r.wgmma else '     '} {r.wide_loads:3d} of {r.loads:3d} loads wide"
    )


def save(path: Path, reports: list[Report]) -> None:
    """Write reports as JSON, one a line."""
    lines = ",\n ".join(json.dumps(asdict(report)) for report in reports)
    head = json.dumps({"triton": triton.__version__, "torch": torch.__version__})
    path.write_text(f'{{"versions": {head}, "rows": [\n {lines}\n]}}\n')
