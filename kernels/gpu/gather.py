# pyright: reportAssignmentType=false
"""The gather kernel: forward pass and input gradient, as a matrix product over the live columns of each tile of rows.

Shapes: R rows in tiles of BLOCK_ROWS, K live columns in blocks of BLOCK_COLUMNS, P positions `(h, w, n)`.
Source `[S, H, W, N]` (the input, or the output's gradient), result `[R, H', W', N]`.
"""

import triton.language as tl

from sparsefx.kernels.gpu.launch import kernel, pass_name


@kernel(pass_name)
def gather_kernel(
    x_ptr,
    w_ptr,
    columns_ptr,
    starts_ptr,
    rows_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    src_h,
    src_w,
    dst_h,
    dst_w,
    batch_units,
    tiles,
    capacity,
    OP: tl.constexpr,
    PASS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BATCH_VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    IS_DGRAD: tl.constexpr = PASS == "dgrad"
    # Every source position of a pointwise layer exists; only other ones need the bounds of the map.
    BOUNDED: tl.constexpr = TAPS > 1 or PAD_H > 0 or PAD_W > 0
    # The input gradient of a strided layer splits into phases, residues of the position that share their taps.
    PHASES_H: tl.constexpr = STRIDE_H if IS_DGRAD else 1
    PHASES_W: tl.constexpr = STRIDE_W if IS_DGRAD else 1
    PHASES: tl.constexpr = PHASES_H * PHASES_W
    STEP_H: tl.constexpr = 1 if IS_DGRAD else STRIDE_H
    STEP_W: tl.constexpr = 1 if IS_DGRAD else STRIDE_W

    batch = batch_units * BATCH_VECTOR
    pid = tl.program_id(0)
    part = pid % (tiles * PHASES)
    tile = part // PHASES
    phase = part % PHASES
    phase_h = phase // PHASES_W
    phase_w = phase % PHASES_W
    sub_h = (dst_h - phase_h + PHASES_H - 1) // PHASES_H
    sub_w = (dst_w - phase_w + PHASES_W - 1) // PHASES_W
    total = sub_h * sub_w * batch
    first = (pid // (tiles * PHASES)) * BLOCK_POSITIONS
    if first >= total:
        return

    p = first + tl.arange(0, BLOCK_POSITIONS)
    n = p % batch
    u = p // batch // sub_w
    v = p // batch % sub_w
    in_batch = p < total
    h0 = u * STEP_H
    w0 = v * STEP_W
    position = (h0.to(tl.int64) * src_w + w0) * batch + n

    lane = tl.arange(0, BLOCK_ROWS)
    list_start = tile.to(tl.int64) * capacity
    begin = tl.load(starts_ptr + tile * (PHASES + 1) + phase)
    end = tl.load(starts_ptr + tile * (PHASES + 1) + phase + 1)
    # Rows on the M side: w [R, K] x [K, P]; on the N side: x [P, K] w [K, R]. These are the axes to insert.
    R_AXIS: tl.constexpr = 1 if ROWS_FIRST else 0
    OTHER_AXIS: tl.constexpr = 1 - R_AXIS
    position = tl.expand_dims(position, OTHER_AXIS)
    h0 = tl.expand_dims(h0, OTHER_AXIS)
    w0 = tl.expand_dims(w0, OTHER_AXIS)
    in_batch = tl.expand_dims(in_batch, OTHER_AXIS)
    lane_w = tl.expand_dims(lane, R_AXIS)
    if ROWS_FIRST:
        acc = tl.full((BLOCK_ROWS, BLOCK_POSITIONS), 0, tl.float32)
    else:
        acc = tl.full((BLOCK_POSITIONS, BLOCK_ROWS), 0, tl.float32)
    for start in range(begin, end, BLOCK_COLUMNS):
        slot = start + tl.arange(0, BLOCK_COLUMNS)
        live = slot < end
        column = tl.load(columns_ptr + list_start + slot, mask=live, other=0)
        live_w = tl.expand_dims(live, OTHER_AXIS)
        inside = tl.expand_dims(live, R_AXIS) & in_batch
        if BOUNDED:
            tap = column % TAPS
            if IS_DGRAD:
                dh = (phase_h + PAD_H - tap // KERNEL_W * DILATION_H) // STRIDE_H
                dw = (phase_w + PAD_W - tap % KERNEL_W * DILATION_W) // STRIDE_W
            else:
                dh = tap // KERNEL_W * DILATION_H - PAD_H
                dw = tap % KERNEL_W * DILATION_W - PAD_W
            h = h0 + tl.expand_dims(dh, R_AXIS)
            w = w0 + tl.expand_dims(dw, R_AXIS)
            inside = inside & (h >= 0) & (h < src_h) & (w >= 0) & (w < src_w)
            source = ((column // TAPS).to(tl.int64) * src_h * src_w + dh * src_w + dw) * batch
        else:
            source = column.to(tl.int64) * src_h * src_w * batch
        x = tl.load(x_ptr + tl.expand_dims(source, R_AXIS) + position, mask=inside, other=0)
        w_offset = tl.expand_dims((list_start + slot) * BLOCK_ROWS, OTHER_AXIS) + lane_w
        weight = tl.load(w_ptr + w_offset, mask=live_w, other=0)
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        if ROWS_FIRST:
            acc = tl.dot(weight, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    row = tl.load(rows_ptr + tile * BLOCK_ROWS + lane)
    result = ((phase_h + u * PHASES_H).to(tl.int64) * dst_w + phase_w + v * PHASES_W) * batch + n
    row_w = tl.expand_dims(row, R_AXIS)
    stored = (row_w >= 0) & in_batch
    offset = row_w.to(tl.int64) * dst_h * dst_w * batch + tl.expand_dims(result, OTHER_AXIS)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row_w, mask=row_w >= 0, other=0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offset, mask=stored, other=0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0)
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=stored)


@kernel(lambda constants: "pack_kernel")
def pack_kernel(
    weight_ptr,
    columns_ptr,
    starts_ptr,
    rows_ptr,
    packed_ptr,
    capacity,
    phases,
    row_stride,
    channel_stride,
    tap_stride,
    TAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Collect the weights of each tile's live columns, `[tiles, capacity, BLOCK_ROWS]`, in the products' type."""
    blocks = (capacity + BLOCK_SLOTS - 1) // BLOCK_SLOTS
    tile = tl.program_id(0) // blocks
    slot = tl.program_id(0) % blocks * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    live = slot < tl.load(starts_ptr + tile * (phases + 1) + phases)
    column = tl.load(columns_ptr + tile.to(tl.int64) * capacity + slot, mask=live, other=0)
    lane = tl.arange(0, BLOCK_ROWS)
    row = tl.load(rows_ptr + tile * BLOCK_ROWS + lane)
    column_offset = (column // TAPS).to(tl.int64) * channel_stride + column % TAPS * tap_stride
    value = tl.load(
        weight_ptr + column_offset[:, None] + row.to(tl.int64)[None, :] * row_stride,
        mask=live[:, None] & (row >= 0)[None, :],
        other=0,
    )
    offset = (tile.to(tl.int64) * capacity + slot)[:, None] * BLOCK_ROWS + lane[None, :]
    tl.store(packed_ptr + offset, value.to(packed_ptr.dtype.element_ty), mask=live[:, None])
