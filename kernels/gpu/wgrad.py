# pyright: reportAssignmentType=false
"""The weight gradient over live columns, or over all of them for the window, and its reduction to the weight's shape.

Work is cut into blocks of BLOCK_ROWS x BLOCK_COLUMNS weights and splits of the positions. A fixed number of programs
walks the work list, whose length lies on the device, so that a new mask changes no launch. Partial sums are added in
one order, so that results repeat bit by bit.
"""

import triton.language as tl

from sparsefx.kernels.gpu.launch import kernel, pass_name


@kernel(pass_name)
def wgrad_kernel(
    x_ptr,
    g_ptr,
    columns_ptr,
    starts_ptr,
    rows_ptr,
    work_starts_ptr,
    work_tiles_ptr,
    flag_ptr,
    partial_ptr,
    src_h,
    src_w,
    dst_h,
    dst_w,
    batch_units,
    tiles,
    capacity,
    splits,
    chunk_blocks,
    row_count,
    column_count,
    OP: tl.constexpr,
    PASS: tl.constexpr,
    DENSE: tl.constexpr,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    BOUNDED: tl.constexpr = TAPS > 1 or PAD_H > 0 or PAD_W > 0
    R_AXIS: tl.constexpr = 1 if ROWS_FIRST else 0
    K_AXIS: tl.constexpr = 1 - R_AXIS
    batch = batch_units * BATCH_VECTOR
    total = dst_h * dst_w * batch
    if DENSE:
        per_tile = (column_count + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
        blocks = tiles * per_tile
        # Outside the window the gradient of missing weights is not wanted: no work, the same launch.
        if tl.load(flag_ptr) == 0:
            blocks = blocks * 0
    else:
        blocks = tl.load(work_starts_ptr + tiles)

    for item in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        split = item // blocks
        block = item % blocks
        lane = tl.arange(0, BLOCK_ROWS)
        if DENSE:
            tile = block // per_tile
            slot = block % per_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            live = slot < column_count
            column = slot
            row = tile * BLOCK_ROWS + lane
            exists = row < row_count
        else:
            tile = tl.load(work_tiles_ptr + block)
            slot = (block - tl.load(work_starts_ptr + tile)) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            live = slot < tl.load(starts_ptr + tile * 2 + 1)
            column = tl.load(columns_ptr + tile.to(tl.int64) * capacity + slot, mask=live, other=0)
            row = tl.load(rows_ptr + tile * BLOCK_ROWS + lane)
            exists = row >= 0
        tap = column % TAPS
        dh = tap // KERNEL_W * DILATION_H - PAD_H
        dw = tap % KERNEL_W * DILATION_W - PAD_W
        source = ((column // TAPS).to(tl.int64) * src_h * src_w + dh * src_w + dw) * batch
        g_row = row.to(tl.int64) * total

        # Rows on the M side: g [R, P] x [P, K]; on the N side: x [K, P] g [P, R]. These are the axes to insert.
        source = tl.expand_dims(source, K_AXIS)
        dh = tl.expand_dims(dh, K_AXIS)
        dw = tl.expand_dims(dw, K_AXIS)
        live = tl.expand_dims(live, K_AXIS)
        exists = tl.expand_dims(exists, R_AXIS)
        g_row = tl.expand_dims(g_row, R_AXIS)
        if ROWS_FIRST:
            acc = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), 0, tl.float32)
        else:
            acc = tl.full((BLOCK_COLUMNS, BLOCK_ROWS), 0, tl.float32)
        first = split * chunk_blocks * BLOCK_POSITIONS
        stop = tl.minimum(first + chunk_blocks * BLOCK_POSITIONS, total)
        for start in range(first, stop, BLOCK_POSITIONS):
            p = start + tl.arange(0, BLOCK_POSITIONS)
            in_batch = p < stop
            h0 = p // batch // dst_w * STRIDE_H
            w0 = p // batch % dst_w * STRIDE_W
            position = (h0.to(tl.int64) * src_w + w0) * batch + p % batch
            inside = live & tl.expand_dims(in_batch, R_AXIS)
            if BOUNDED:
                h = tl.expand_dims(h0, R_AXIS) + dh
                w = tl.expand_dims(w0, R_AXIS) + dw
                inside = inside & (h >= 0) & (h < src_h) & (w >= 0) & (w < src_w)
            x = tl.load(x_ptr + source + tl.expand_dims(position, R_AXIS), mask=inside, other=0)
            g_inside = exists & tl.expand_dims(in_batch, K_AXIS)
            g = tl.load(g_ptr + g_row + tl.expand_dims(p, K_AXIS), mask=g_inside, other=0)
            if UPCAST:
                x = x.to(tl.float32)
                g = g.to(tl.float32)
            if ROWS_FIRST:
                acc = tl.dot(g, x, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(x, g, acc, input_precision=PRECISION)
        place = (split * tiles + tile).to(tl.int64) * BLOCK_ROWS + lane
        target = tl.expand_dims(place * capacity, R_AXIS) + tl.expand_dims(slot, K_AXIS)
        tl.store(partial_ptr + target, acc, mask=live)


@kernel(lambda constants: "dense_wgrad_sum_kernel" if constants["DENSE"] else "wgrad_sum_kernel")
def sum_kernel(
    partial_ptr,
    matrix_ptr,
    place_ptr,
    slots_ptr,
    flag_ptr,
    grad_ptr,
    tiles,
    capacity,
    splits,
    row_count,
    column_count,
    row_stride,
    channel_stride,
    tap_stride,
    DENSE: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the splits and write the weight's gradient, zero at missing weights; `DENSE` leaves it alone if unflagged."""
    if DENSE:  # noqa: SIM102 - one condition would load from the flag that is not there otherwise
        if tl.load(flag_ptr) == 0:
            return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = index // column_count
    column = index % column_count
    wanted = row < row_count
    if DENSE:
        place = row
        slot = column
        exists = wanted
    else:
        place = tl.load(place_ptr + row, mask=wanted, other=0).to(tl.int64)
        slot = tl.load(slots_ptr + place // BLOCK_ROWS * column_count + column, mask=wanted, other=-1)
        exists = tl.load(matrix_ptr + index, mask=wanted, other=0) != 0
    acc = tl.full((BLOCK,), 0, tl.float32)
    for split in range(splits):
        source = (split * tiles * BLOCK_ROWS + place) * capacity + slot
        acc += tl.load(partial_ptr + source, mask=exists, other=0)
    offset = row * row_stride + column // TAPS * channel_stride + column % TAPS * tap_stride
    tl.store(grad_ptr + offset, acc.to(grad_ptr.dtype.element_ty), mask=wanted)
