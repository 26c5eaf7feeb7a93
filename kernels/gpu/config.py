"""Kernel configurations, and our own table from a layer's shape, type and density to them.

`torch.compile` sees opaque operators, so that Triton's own autotuner is not used: a choice is looked up in the table
that `python -m sparsefx tune` fills, and where it has no row, in the defaults below.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
import triton

_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
NARROWEST = 16 if _OLD else 8
"""Rows of the smallest tile. Triton 3.6 uses wgmma from 16 on the N side; a unit of 8 then half fills its tile."""
PASSES = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class Config:
    """How one kernel cuts up its product.

    Attributes:
        rows: Rows of a tile: output channels for fprop and wgrad, input channels for dgrad.
        columns: Live columns in a block.
        positions: Positions in a block.
        rows_first: Whether rows lie on the M side of the matrix instruction, which starts at 64; the N side at 8.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    rows: int
    columns: int
    positions: int
    rows_first: bool
    warps: int
    stages: int


def default(kind: str, dtype: torch.dtype, rows: int) -> Config:
    """The configuration of a pass without a row in the table.

    Args:
        kind: One of `PASSES`.
        dtype: Of the activations.
        rows: Rows of a tile, 8 to 128.
    """
    wide = dtype == torch.float32
    warps = 8 if rows == 128 and (wide or kind != "wgrad") else 4
    if kind == "wgrad":
        return Config(rows, 64, 32 if wide else 64, rows >= 64, warps, 3)
    if not wide:
        spills = _OLD and (rows == 16 or (rows == 128 and kind == "dgrad"))  # with 64 columns on sm_80
        return Config(rows, 32 if spills else 64, 128, rows >= 64, warps, 3)
    # Wider blocks spill registers.
    return Config(rows, 16 if rows == 128 else 32, 64 if rows >= 32 else 128, rows >= 64, warps, 3)


def bucket(density: float) -> int:
    """Density in half powers of two, as the table and the specializer count it."""
    return round(2 * math.log2(max(density, 1e-4)))


def key(kind: str, shape: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype, rows: int, density: float) -> str:
    """Row of the table: pass, weight shape, `(stride, H, W, N)`, type, rows of a tile, bucket of column density."""
    name = str(dtype).removeprefix("torch.")
    return f"{kind} {'x'.join(map(str, shape))} {'x'.join(map(str, size))} {name} h{rows} d{bucket(density)}"


class Table:
    """Configurations by key, one table for each device.

    The shipped table is `table.json` beside this file; entries that are tuned at run time are kept in memory, and
    `save` writes them.
    """

    def __init__(self, entries: dict[str, dict[str, Config]] | None = None) -> None:
        self.entries = entries or {}

    @classmethod
    def load(cls, text: str) -> "Table":
        """Read what `dump` wrote."""
        raw = json.loads(text)
        return cls({device: {k: Config(**v) for k, v in rows.items()} for device, rows in raw.items()})

    def dump(self) -> str:
        """The table as JSON."""
        plain = {device: {k: asdict(v) for k, v in rows.items()} for device, rows in self.entries.items()}
        return json.dumps(plain, indent=1, sort_keys=True) + "\n"

    def save(self, path: Path) -> None:
        """Write the table."""
        path.write_text(self.dump())

    def get(self, device: str, name: str) -> Config | None:
        """The configuration for a key on a device, None without a row."""
        return self.entries.get(device, {}).get(name)

    def put(self, device: str, name: str, config: Config) -> None:
        """Add or replace a row."""
        self.entries.setdefault(device, {})[name] = config


@cache
def shipped() -> Table:
    """The table that comes with sparsefx."""
    return Table.load((files("sparsefx.kernels.gpu") / "table.json").read_text())


def shipped_configs(dtype: torch.dtype) -> list[tuple[str, Config]]:
    """Every (pass, configuration) that can be chosen for a type: the defaults and the rows of the shipped table."""
    found = [
        (kind, default(kind, dtype, rows)) for kind in PASSES for rows in (8, 16, 32, 64, 128) if rows >= NARROWEST
    ]
    name = str(dtype).removeprefix("torch.")
    for rows in shipped().entries.values():
        found += [(k.split()[0], config) for k, config in rows.items() if k.split()[3] == name]
    return list(dict.fromkeys(found))
