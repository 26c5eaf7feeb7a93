"""Library calls made ready once and run again and again, with buffers planned ahead in one piece of memory."""

import ctypes
import operator
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from .abi import arguments_of, check
from .buffers import SMALLEST

ALIGNMENT = 64
_WORD = 8
_ARENA, _OTHER, _FIRST_GIVEN = range(3)  # bases of addresses


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

    Attributes:
        arena: Bytes that a run needs for buffers that are not given; once `finish` was called.
        places: Offsets of those buffers.
        watch: Of all lists of calls: makes the context in which a call of a function is made, by the function's name.
    """

    watch: ClassVar[Callable[[str], AbstractContextManager[Any]] | None] = None

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._planned: list[tuple[str, tuple[Any, ...]]] = []
        self._lives: dict[Buffer, tuple[int, int]] = {}
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
        self,
        given: Sequence[Buffer],
        elsewhere: dict[Buffer, int] | None = None,
        kept: Callable[[Buffer], bool] = lambda _: False,
    ) -> None:
        """Find a place for each buffer and make the calls ready.

        Args:
            given: The order in which a run says where buffers lie that are given; with others that no call names.
            elsewhere: Offsets of buffers in the arena of other calls, which a run is given as well.
            kept: Whether a buffer is needed after the last call.
        Raises:
            TypeError: a function, or an argument, is nothing that can be called or given, or there are too few or many.
        """
        other = elsewhere or {}
        ours = [b for b in self._lives if not b.given and b not in other]
        self.places, size = plan({b: self._lives[b] for b in ours}, kept)
        self.arena = _rounded(size)
        bases = {b: (_ARENA, offset) for b, offset in self.places.items()}
        bases |= {b: (_OTHER, offset) for b, offset in other.items()}
        bases |= {b: (_FIRST_GIVEN + i, 0) for i, b in enumerate(given)}
        self._bases = (ctypes.c_int64 * (_FIRST_GIVEN + len(given)))()
        used = [a for _, arguments in self._planned for a in arguments]
        count = len(used) + sum(a.words for a in used if isinstance(a, Structure))
        self._words = (ctypes.c_int64 * count)()
        homes: list[tuple[int, int, int]] = []  # (word, base, offset)
        calls: list[tuple[int, int]] = []  # (caller, first word)
        at, behind = 0, len(used)
        for function, arguments in self._planned:
            calls.append((self._caller(function, len(arguments)), at))
            for argument in arguments:
                if isinstance(argument, Buffer):
                    homes.append((at, *bases[argument]))
                elif isinstance(argument, Structure):
                    self._words[at] = ctypes.addressof(self._words) + _WORD * behind
                    homes += [(word, *bases[b]) for word, b in argument.place(self._words, behind)]
                    behind += argument.words
                else:
                    self._words[at] = _word(argument)
                at += 1
        self._homes, self._calls = _table(homes), _table(calls)
        self._arguments = self._words, self._homes, len(homes), self._bases

    def run(self, arena: int, given: Sequence[int], other: int = 0) -> None:
        """Make all calls.

        Args:
            arena: Address of `self.arena` bytes.
            given: Addresses of the buffers that `finish` named, in its order.
            other: Address of the arena of `elsewhere`.
        Raises:
            RuntimeError: a call failed.
        """
        with self._lock:  # another thread may run the same model
            self._bases[:] = (arena, other, *given)
            if Calls.watch is None:
                self._make(0, len(self._planned))
                return
            for at, (function, _) in enumerate(self._planned):
                with Calls.watch(function):
                    self._make(at, 1)

    def _make(self, first: int, count: int) -> None:
        calls = ctypes.addressof(self._calls) + 2 * _WORD * first
        status = self.library.sfx_run(*self._arguments, calls, count, torch.get_num_threads())
        check(self.library, status)

    def _caller(self, function: str, count: int) -> int:
        caller = self.library.sfx_caller(function.encode())
        if caller is None:
            raise TypeError(f"{function}: expected a function that calls.cpp knows, got another; add it there")
        wanted = arguments_of(function) - 1
        if count != wanted:
            raise TypeError(f"{function}: expected {wanted} arguments before the threads, got {count}; see abi.h")
        return caller


class Structure:
    """An argument passed by address, whose fields may be buffers.

    Args:
        kind: Its fields that are buffers are pointers.
    """

    def __init__(self, kind: type[ctypes.Structure], **fields: Any) -> None:
        self.kind, self.fields = kind, fields
        self.words = -(-ctypes.sizeof(kind) // _WORD)

    def place(self, memory: ctypes.Array, at: int) -> list[tuple[int, Buffer]]:
        """Make it at word `at` of `memory`, and tell the words that hold addresses of buffers."""
        made = self.kind.from_buffer(memory, _WORD * at)
        found = []
        for name, value in self.fields.items():
            if isinstance(value, Buffer):
                found.append((at + getattr(self.kind, name).offset // _WORD, value))
            else:
                setattr(made, name, value)
        return found


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


def _word(argument: Any) -> int:
    """A number, an array that the caller keeps, or nothing, as a word."""
    if isinstance(argument, ctypes.Array):
        return ctypes.addressof(argument)
    return 0 if argument is None else operator.index(argument)


def _table(rows: Sequence[tuple[int, ...]]) -> ctypes.Array:
    flat = [value for row in rows for value in row]
    return (ctypes.c_int64 * len(flat))(*flat)
