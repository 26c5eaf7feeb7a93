"""One kernel source for two machines: compiled for CUDA tensors, interpreted for CPU tensors.

The interpreter needs no environment variable and shows on any machine that a kernel is right. It calls the Python
function itself, so that kernels use only builtins of `triton.language`, not its library of `@jit` helpers.
"""

from collections.abc import Callable
from typing import Any

import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


def _repair() -> None:
    """Let a loaded number bound a loop, whatever the NumPy: the interpreter before 3.9 calls `int` of an array."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    _repair()


class Kernel:
    """A Triton kernel that runs where its tensors are.

    Args:
        fn: The kernel's source.
        name: Name in traces and reports, from the constants of a specialization.
    """

    def __init__(self, fn: Callable, name: Callable[[dict[str, Any]], str]) -> None:
        self.fn, self.name = fn, name
        self.jit = JITFunction(fn, repr=lambda special: name(special.constants))
        self.interpreted = InterpretedFunction(fn)

    def launch(self, grid: int, *, cuda: bool, **arguments: Any) -> None:
        """Run `grid` programs with the kernel's arguments by name."""
        if cuda:
            self.jit[(grid,)](**arguments, enable_fp_fusion=True)
        else:
            options = ("num_warps", "num_stages")
            self.interpreted[(grid,)](**{k: v for k, v in arguments.items() if k not in options})


def kernel(name: Callable[[dict[str, Any]], str]) -> Callable[[Callable], Kernel]:
    """Make a function a `Kernel`."""
    return lambda fn: Kernel(fn, name)


def pass_name(constants: dict[str, Any]) -> str:
    """`<op>_<pass>_kernel`, from the constants OP and PASS."""
    return f"{constants['OP']}_{constants['PASS']}_kernel"
