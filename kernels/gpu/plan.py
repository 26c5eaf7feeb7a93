"""One sparse layer on `[C, H, W, N]` activations: patterns, packed weights and the launches of its passes."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.kernels.gpu.config import Config
from sparsefx.kernels.gpu.gather import gather_kernel, pack_kernel
from sparsefx.kernels.gpu.wgrad import sum_kernel, wgrad_kernel
from sparsefx.kernels.patterns import Pattern, Tiling, forward_matrix, tap_phases, transposed_matrix
from sparsefx.kernels.spec import ConvSpec

_SPLIT = 4096
"""Positions that one program of the weight gradient adds up at least."""
_PARTIAL_BYTES = 128 << 20
"""Largest buffer of partial weight gradients, unless a single one is larger."""
_PROGRAMS_PER_SM = 4


class Geometry(NamedTuple):
    """Kernel, stride, padding and dilation, each `(h, w)`; a linear layer is a pointwise one on a 1 x 1 map."""

    op: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor, spec: ConvSpec | None) -> "Geometry":
        """Geometry of a layer; `spec` is None for a linear one."""
        if spec is None:
            return cls("linear", (1, 1), (1, 1), (0, 0), (1, 1))
        kernel = (mask.shape[2], mask.shape[3])
        pairs = [(v[0], v[1]) for v in (spec.stride, spec.padding, spec.dilation)]
        return cls("pointwise" if kernel == (1, 1) else "conv", kernel, *pairs)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        """Size of the output map."""
        a, b = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip((h, w), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return a, b

    @property
    def constants(self) -> dict[str, int | str]:
        """The geometry as the kernels take it."""
        names = ("KERNEL", "STRIDE", "PAD", "DILATION")
        return {"OP": self.op} | {
            f"{name}_{axis}": value
            for name, pair in zip(names, self[1:], strict=True)
            for axis, value in zip("HW", pair, strict=True)
        }


class LayerPlan:
    """Passes of one layer over the live columns of its mask.

    Args:
        mask: Bool `[O, I, R, S]`, or `[O, I]` for a linear layer.
        geometry: Of the layer.
        configs: A configuration for each pass; that of wgrad has the rows of fprop's.
        unit: Output channels in a unit of the granularity, where it is known; a tile then holds whole units.
    """

    def __init__(self, mask: Tensor, geometry: Geometry, configs: dict[str, Config], unit: int | None = None) -> None:
        if configs["wgrad"].rows != configs["fprop"].rows:
            raise ValueError(f"configs: expected one number of rows for fprop and wgrad, got {configs}; pass the same")
        self.geometry, self.configs, self.shape = geometry, configs, tuple(mask.shape)
        out, inputs, taps = mask.shape[0], mask.shape[1], geometry.taps
        rows = configs["fprop"].rows
        forward = Tiling(rows, min(unit or rows, rows), cluster=unit is None, work=configs["wgrad"].columns)
        self.forward = Pattern(out, inputs * taps, forward, mask.device)
        phases = tap_phases(out, *geometry[1:])
        strides = geometry.stride[0] * geometry.stride[1]
        backward = Tiling(configs["dgrad"].rows, configs["dgrad"].rows)
        self.backward = Pattern(inputs, out * taps, backward, mask.device, phases, strides)
        self.update_(mask)

    def update_(self, mask: Tensor) -> None:
        """Take a new mask; every buffer keeps its address."""
        self.forward.update_(forward_matrix(mask))
        self.backward.update_(transposed_matrix(mask))

    def fprop(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        relu: bool = False,
        precision: str = "ieee",
    ) -> Tensor:
        """Output `[O, H', W', N]` of an input `[I, H, W, N]`, plus bias `[O]` and a residual of the output's shape.

        Args:
            weight: Of the mask's shape, zero where it is False.
            relu: Clamp the result at zero.
            precision: Of fp32 products: "ieee" or "tf32".
        """
        out = self._empty(x, self.shape[0], self.geometry.out_hw(*x.shape[1:3]))
        self._gather("fprop", self.forward, x, weight, out, bias, residual, relu, precision)
        return out

    def dgrad(self, grad: Tensor, weight: Tensor, input_hw: tuple[int, int], *, precision: str = "ieee") -> Tensor:
        """Gradient `[I, H, W, N]` of the input from that of the output, `[O, H', W', N]`."""
        out = self._empty(grad, self.shape[1], input_hw)
        self._gather("dgrad", self.backward, grad, weight, out, None, None, False, precision)
        return out

    def wgrad(self, grad: Tensor, x: Tensor, weight: Tensor, *, precision: str = "ieee") -> Tensor:
        """Gradient of the existing weights, zero at the missing ones, laid out and typed as `weight`."""
        out = torch.empty_like(weight)
        self._wgrad(grad, x, out, None, precision)
        return out

    def dense_wgrad_(self, grad: Tensor, x: Tensor, flag: Tensor, out: Tensor, *, precision: str = "ieee") -> None:
        """Write the gradient of all weights to `out` if the device holds a nonzero `flag`, int32 `[1]`; else nothing.

        The launch is the same either way, so that one captured graph serves steps inside and outside the window.
        """
        self._wgrad(grad, x, out, flag, precision)

    def pack(self, kind: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights of the live columns of each tile, `[tiles, capacity, rows]`, for "fprop" or "dgrad"."""
        pattern = self.forward if kind == "fprop" else self.backward
        block = 32
        packed = torch.empty(pattern.tiles, pattern.capacity, pattern.tiling.block, dtype=dtype, device=weight.device)
        out_stride, in_stride, tap_stride = _strides(weight)
        by_row, by_channel = (out_stride, in_stride) if kind == "fprop" else (in_stride, out_stride)
        pack_kernel.launch(
            pattern.tiles * -(-pattern.capacity // block),
            cuda=weight.is_cuda,
            weight_ptr=weight,
            columns_ptr=pattern.columns,
            starts_ptr=pattern.starts,
            rows_ptr=pattern.rows,
            packed_ptr=packed,
            capacity=pattern.capacity,
            phases=pattern.phase_count,
            row_stride=by_row,
            channel_stride=by_channel,
            tap_stride=tap_stride,
            TAPS=self.geometry.taps,
            BLOCK_ROWS=pattern.tiling.block,
            BLOCK_SLOTS=block,
        )
        return packed

    def _gather(
        self,
        kind: str,
        pattern: Pattern,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        precision: str,
    ) -> None:
        config = self.configs[kind]
        packed = self.pack(kind, weight, x.dtype)
        phases = pattern.phase_count
        step_h, step_w = self.geometry.stride if phases > 1 else (1, 1)
        _, dst_h, dst_w, images = out.shape
        positions = -(-dst_h // step_h) * -(-dst_w // step_w) * images
        units, vector = batch_units(images)
        gather_kernel.launch(
            pattern.tiles * phases * -(-positions // config.positions),
            cuda=x.is_cuda,
            x_ptr=x,
            w_ptr=packed,
            columns_ptr=pattern.columns,
            starts_ptr=pattern.starts,
            rows_ptr=pattern.rows,
            bias_ptr=bias,
            residual_ptr=residual,
            y_ptr=out,
            src_h=x.shape[1],
            src_w=x.shape[2],
            dst_h=dst_h,
            dst_w=dst_w,
            batch_units=units,
            tiles=pattern.tiles,
            capacity=pattern.capacity,
            **self.geometry.constants,
            PASS="fwd" if kind == "fprop" else kind,
            BATCH_VECTOR=vector,
            **blocks(config),
            RELU=relu,
            PRECISION=precision,
            UPCAST=_upcast(x),
            num_warps=config.warps,
            num_stages=config.stages,
        )

    def _wgrad(self, grad: Tensor, x: Tensor, out: Tensor, flag: Tensor | None, precision: str) -> None:
        config, pattern, dense = self.configs["wgrad"], self.forward, flag is not None
        _, dst_h, dst_w, images = grad.shape
        rows, columns = pattern.row_count, pattern.column_count
        tiles = -(-rows // config.rows) if dense else pattern.tiles
        capacity = pattern.capacity
        splits, chunk_blocks = split(dst_h * dst_w * images, tiles * config.rows * capacity, config.positions)
        partial = torch.empty(splits, tiles, config.rows, capacity, dtype=torch.float32, device=x.device)
        units, vector = batch_units(images)
        shared = {
            "flag_ptr": flag,
            "tiles": tiles,
            "capacity": capacity,
            "splits": splits,
            "row_count": rows,
            "column_count": columns,
            "DENSE": dense,
        }
        most = tiles * -(-columns // config.columns) * splits
        wgrad_kernel.launch(
            min(most, programs(x.device)),
            cuda=x.is_cuda,
            x_ptr=x,
            g_ptr=grad,
            columns_ptr=pattern.columns,
            starts_ptr=pattern.starts,
            rows_ptr=pattern.rows,
            work_starts_ptr=pattern.work_starts,
            work_tiles_ptr=pattern.work_tiles,
            partial_ptr=partial,
            src_h=x.shape[1],
            src_w=x.shape[2],
            dst_h=dst_h,
            dst_w=dst_w,
            batch_units=units,
            chunk_blocks=chunk_blocks,
            **shared,
            **self.geometry.constants,
            PASS="dense_wgrad" if dense else "wgrad",
            BATCH_VECTOR=vector,
            **blocks(config),
            PRECISION=precision,
            UPCAST=_upcast(x),
            num_warps=config.warps,
            num_stages=config.stages,
        )
        out_stride, in_stride, tap_stride = _strides(out)
        block = 1024
        sum_kernel.launch(
            -(-rows * columns // block),
            cuda=x.is_cuda,
            partial_ptr=partial,
            matrix_ptr=pattern.matrix,
            place_ptr=pattern.place,
            slots_ptr=pattern.slots,
            grad_ptr=out,
            row_stride=out_stride,
            channel_stride=in_stride,
            tap_stride=tap_stride,
            **shared,
            TAPS=self.geometry.taps,
            BLOCK_ROWS=config.rows,
            BLOCK=block,
        )

    def _empty(self, like: Tensor, channels: int, hw: tuple[int, int]) -> Tensor:
        images = like.shape[3]
        if max(hw[0] * hw[1], like.shape[1] * like.shape[2]) * images >= 2**31:
            raise ValueError(
                f"activations: expected fewer than 2^31 positions H * W * N, got {tuple(like.shape)} to {hw}; "
                "use smaller batches"
            )
        return torch.empty(channels, *hw, images, dtype=like.dtype, device=like.device)


def blocks(config: Config) -> dict[str, int | bool]:
    """A configuration as the kernels take it."""
    return {
        "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns,
        "BLOCK_POSITIONS": config.positions,
        "ROWS_FIRST": config.rows_first,
    }


def batch_units(images: int) -> tuple[int, int]:
    """Split a batch into units and a power of two that the compiler knows, for loads of up to 16 bytes."""
    vector = min(images & -images, 16) if images else 1
    return images // vector, vector


def split(positions: int, weights: int, block: int) -> tuple[int, int]:
    """Number of splits of the weight gradient's sum, and blocks of positions in each."""
    most = max(1, _PARTIAL_BYTES // (4 * weights))
    splits = max(1, min(positions // _SPLIT, most))
    chunk_blocks = -(-positions // (splits * block))
    return -(-positions // (chunk_blocks * block)), chunk_blocks


def programs(device: torch.device) -> int:
    """Programs of a persistent kernel; a few where the interpreter runs them in turn."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_SM


def _upcast(x: Tensor) -> bool:
    """The interpreter computes bf16 products wrongly and has those of fp32 exact."""
    return not x.is_cuda and x.dtype == torch.bfloat16


def _strides(weight: Tensor) -> tuple[int, int, int]:
    """Strides of output channel, input channel and tap; taps lie evenly in both of torch's formats."""
    return weight.stride(0), weight.stride(1), weight.stride(3) if weight.dim() == 4 else 1
