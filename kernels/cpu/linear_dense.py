"""Products of a linear layer with all of its weights, existing or not."""

import torch

from .abi import check, empty, load, pointer, require

MOST_ROWS, FEWEST_LANES = 512, 8
"""Beyond these the vendor's product of a linear layer is faster, even with a pass that masks it: sums over more rows,
whose tiles leave the caches; and vectors of fewer lanes than the vendor's."""


def linear_dense_fprop(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    relu: bool = False,
    isa: str | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias`, then a ReLU where asked for.

    Args:
        x: `[N, I]` fp32.
        weight: `[O, I]` fp32.
        bias: `[O]` fp32, or None.
        isa: "avx512", "avx2" or "portable"; the best of this processor if None.
    Raises:
        ValueError: the shapes do not fit each other.
    """
    _require(x=x, weight=weight)
    outs, ins = weight.shape
    if x.shape[1] != ins or (bias is not None and bias.shape != (outs,)):
        raise ValueError(
            f"x: expected [N, {ins}] and a bias [{outs}] or None for a weight {tuple(weight.shape)}, got "
            f"{tuple(x.shape)} and {bias if bias is None else tuple(bias.shape)}; pass the layer's own tensors"
        )
    if bias is not None:
        require("bias", bias, dtype=torch.float32)
    lib = load(isa)
    out = empty(lib, (x.shape[0], outs), torch.float32)
    status = lib.sfx_linear_dense_fprop(
        pointer(x), pointer(weight), x.shape[0], outs, ins, pointer(bias), relu, pointer(out), torch.get_num_threads()
    )
    check(lib, status)
    return out


def linear_dense_dgrad(grad: torch.Tensor, weight: torch.Tensor, *, isa: str | None = None) -> torch.Tensor:
    """`grad @ weight`, the input's gradient `[N, I]`.

    Args:
        grad: `[N, O]` fp32.
        weight: `[O, I]` fp32.
        isa: As for `linear_dense_fprop`.
    Raises:
        ValueError: the shapes do not fit each other.
    """
    _require(grad=grad, weight=weight)
    outs, ins = weight.shape
    if grad.shape[1] != outs:
        raise ValueError(
            f"grad: expected [N, {outs}] for a weight {tuple(weight.shape)}, got {tuple(grad.shape)}; pass the layer's "
            "own tensors"
        )
    lib = load(isa)
    out = empty(lib, (grad.shape[0], ins), torch.float32)
    status = lib.sfx_linear_dense_dgrad(
        pointer(grad), pointer(weight), grad.shape[0], outs, ins, pointer(out), torch.get_num_threads()
    )
    check(lib, status)
    return out


def linear_dense_wgrad(
    grad: torch.Tensor, x: torch.Tensor, mask: torch.Tensor, *, keep: bool = False, isa: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`grad.T @ x`, the weight gradient `[O, I]`, zero where `mask` is False; and, if `keep`, that of all weights.

    Args:
        grad: `[N, O]` fp32.
        x: `[N, I]` fp32.
        mask: `[O, I]` bool, True where a weight exists.
        isa: As for `linear_dense_fprop`.
    Raises:
        ValueError: the shapes do not fit each other.
    """
    _require(grad=grad, x=x)
    if grad.shape[0] != x.shape[0] or mask.shape != (grad.shape[1], x.shape[1]) or not mask.is_contiguous():
        raise ValueError(
            f"grad: expected [N, O] for x [N, I] and a contiguous mask [O, I], got {tuple(grad.shape)}, "
            f"{tuple(x.shape)} and {tuple(mask.shape)}; pass the layer's own tensors"
        )
    lib = load(isa)
    out = empty(lib, mask.shape, torch.float32)
    dense = empty(lib, mask.shape, torch.float32) if keep else None
    status = lib.sfx_linear_dense_wgrad(
        pointer(grad), pointer(x), x.shape[0], *mask.shape, pointer(mask), pointer(out), pointer(dense),
        torch.get_num_threads(),
    )  # fmt: skip
    check(lib, status)
    return out, dense


def _require(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        require(name, tensor, dtype=torch.float32, dims=2)
