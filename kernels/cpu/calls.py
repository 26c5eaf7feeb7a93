"""Library calls made ready once and run again and again, with buffers planned ahead in one piece of memory."""

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .abi import check
from .buffers import SMALLEST

ALIGNMENT = 64
_WORD = 8


class Buffer:
    """Memory that calls read and write.

    Attributes:
        size: Bytes.
        given: Whether each run says where it lies; else it has a place in an arena. May change until `Calls.finish`.
    """

    def __init__(self, size: int, *, given: bool = False) -> None:
        self.size, self.given = size, given


class Calls:
    """A list of library calls on buffers.

    Calls that follow each other share what the library needs no longer: a buffer has its place from the first call that
    names it to the last.

    Args:
        library: With a status of 0 for success from every function that returns one.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._threads = ctypes.c_int()
        self._planned: list[tuple[str, tuple[Any, ...]]] = []
        self._lives: dict[Buffer, tuple[int, int]] = {}
        self._ready: list[tuple[str, tuple[Any, ...]]] = []
        self._lock = threading.Lock()

    def add(self, function: str, *arguments: Any) -> None:
        """Call a function of the library; a `Buffer` stands for its address, a `Structure` for its own.

        The number of threads is the last argument of all functions, and is not named.
        """
        at = len(self._planned)
        self._planned.append((function, arguments))
        for argument in arguments:
            named = argument.fields.values() if isinstance(argument, Structure) else (argument,)
            for buffer in named:
                if isinstance(buffer, Buffer):
                    self._lives[buffer] = self._lives.get(buffer, (at, at))[0], at

    def uses(self, buffer: Buffer) -> bool:
        """Whether a call names the buffer."""
        return buffer in self._lives

    def finish(
        self, elsewhere: dict[Buffer, int] | None = None, kept: Callable[[Buffer], bool] = lambda _: False
    ) -> None:
        """Find a place for each buffer and make the calls ready.

        Args:
            elsewhere: Offsets of buffers in the arena of other calls, which a run is given as well.
            kept: Whether a buffer is needed after the last call.
        """
        other = elsewhere or {}
        ours = [b for b in self._lives if not b.given and b not in other]
        self.places, size = plan({b: self._lives[b] for b in ours}, kept)
        self.arena = _rounded(size)
        self.given = [b for b in self._lives if b.given]
        numbers = {b: i for i, b in enumerate(self._lives)}
        structures = [a for _, arguments in self._planned for a in arguments if isinstance(a, Structure)]
        words = len(numbers) + sum(s.words for s in structures)
        memory = (ctypes.c_int64 * words)()
        self._cells = np.frombuffer(memory, dtype=np.int64)  # pyright: ignore[reportCallIssue, reportArgumentType]
        pointers = {b: ctypes.c_void_p.from_buffer(memory, _WORD * i) for b, i in numbers.items()}
        homes: dict[Buffer, list[int]] = {b: [i] for b, i in numbers.items()}
        made: dict[Structure, Any] = {}
        at = len(numbers)
        for structure in structures:
            made[structure] = structure.place(memory, at, homes)
            at += structure.words
        ready = {**pointers, **made}
        for function, arguments in self._planned:
            self._ready.append((function, (*(ready.get(a, a) if _known(a) else a for a in arguments), self._threads)))
        self._ours = _places(homes, self.places)
        self._others = _places(homes, {b: o for b, o in other.items() if b in self._lives})
        self._given_cells = np.array([cell for b in self.given for cell in homes[b]], dtype=np.int64)
        self._given_of = np.array([i for i, b in enumerate(self.given) for _ in homes[b]], dtype=np.int64)

    def run(self, arena: int, given: Sequence[int], other: int = 0) -> None:
        """Make all calls.

        Args:
            arena: Address of `self.arena` bytes.
            given: Addresses of `self.given`.
            other: Address of the arena of `elsewhere`.
        Raises:
            RuntimeError: a call failed.
        """
        with self._lock:  # another thread may run the same model
            cells = self._cells
            cells[self._ours[0]] = self._ours[1] + arena
            cells[self._others[0]] = self._others[1] + other
            cells[self._given_cells] = np.array(given, dtype=np.int64)[self._given_of]
            self._threads.value = torch.get_num_threads()
            for function, arguments in self._ready:
                if getattr(self.library, function)(*arguments):
                    check(self.library, 1)


class Structure:
    """An argument passed by address, whose fields may be buffers.

    Args:
        kind: Its fields that are buffers are pointers.
    """

    def __init__(self, kind: type[ctypes.Structure], **fields: Any) -> None:
        self.kind, self.fields = kind, fields
        self.words = -(-ctypes.sizeof(kind) // _WORD)

    def place(self, memory: ctypes.Array, at: int, homes: dict[Buffer, list[int]]) -> Any:
        """Make it at word `at` of `memory`, note the cells of its buffers, and return the argument."""
        made = self.kind.from_buffer(memory, _WORD * at)
        for name, value in self.fields.items():
            if isinstance(value, Buffer):
                homes[value].append(at + getattr(self.kind, name).offset // _WORD)
            else:
                setattr(made, name, value)
        return ctypes.byref(made)


def plan(lives: dict[Buffer, tuple[int, int]], kept: Callable[[Buffer], bool]) -> tuple[dict[Buffer, int], int]:
    """Offsets in an arena, in which buffers share what none of their calls need at the same time; and its bytes.

    Args:
        lives: First and last call of each.
        kept: Whether a buffer is needed after all calls.
    """
    places: dict[Buffer, int] = {}
    total = 0
    taken: list[tuple[int, int, Buffer]] = []  # (offset, end, whose), by offset
    for buffer, (first, _) in sorted(lives.items(), key=lambda item: item[1][0]):
        taken = [t for t in taken if kept(t[2]) or lives[t[2]][1] >= first]
        size, at, best = -(-buffer.size // ALIGNMENT) * ALIGNMENT, 0, None
        for start, end, _ in [*taken, (total, total, buffer)]:
            room = start - at
            if room >= size and (best is None or room < best[1]):
                best = at, room
            at = max(at, end)
        offset = best[0] if best is not None else at
        places[buffer] = offset
        total = max(total, offset + size)
        taken.append((offset, offset + size, buffer))
        taken.sort(key=lambda t: t[0])
    return places, total


def _rounded(size: int) -> int:
    """A size that calls of about as many bytes share, as after a mask changed: `buffers` keeps memory by its size."""
    step = 1 << (size.bit_length() - 5) if size >= SMALLEST else ALIGNMENT
    return -(-size // step) * step


def _places(homes: dict[Buffer, list[int]], offsets: dict[Buffer, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cells that hold addresses in an arena, and the offsets to add to its own."""
    pairs = [(cell, offset) for b, offset in offsets.items() for cell in homes[b]]
    cells = np.array([cell for cell, _ in pairs], dtype=np.int64)
    return cells, np.array([offset for _, offset in pairs], dtype=np.int64)


def _known(argument: Any) -> bool:
    return isinstance(argument, Buffer | Structure)
