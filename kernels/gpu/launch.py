"""One kernel source for two machines: compiled for CUDA tensors, interpreted for CPU tensors.

The interpreter needs no environment variable and shows on any machine that a kernel is right. It calls the Python
function itself, so that kernels use only builtins of `triton.language`, not its library of `@jit` helpers.
"""

from collections.abc import Callable
from typing import Any

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


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
