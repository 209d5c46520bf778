"""Triton kernels of a step: each reads or writes every matrix of the model in one launch.

A launch has one program per tile. Which tensor a tile belongs to, and where that lies in memory, comes from integer
tables on the device (``tiles`` builds them), because small matrices alone would not fill a GPU. Whether a parameter is
written at all is a flag on the device, so no kernel waits for the host.

Shapes and strides are in elements. ``EVEN`` promises that rows start on 16 bytes and that extents are multiples of 16, so
that accesses of 16 bytes lie inside or outside as a whole. No branch depends on data except through masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apollo_tp.optim.rounding_kernels import join, random_bits, store

# Columns (int64) of the table of projected matrices, and of that of written pieces; ``tiles`` says what is in them.
PROJECT_COLUMNS = tl.constexpr(8)
WRITE_COLUMNS = tl.constexpr(15)


@triton.jit
def unpack_signs_kernel(
    words,  # int32 (columns, WORDS): packed signs
    out,  # bf16 (columns, RANK_PADDED): +1, -1, and 0 beyond the rank
    num_columns,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dense signs from packed ones."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = tl.arange(0, RANK_PADDED)[None, :]
    inside = (column < num_columns) & (row < RANK)
    word = tl.load(words + column.to(tl.int64) * WORDS + row // 32, mask=inside, other=0)
    sign = 1 - 2 * ((word >> (row % 32)) & 1)
    value = tl.where(row < RANK, sign, 0).to(tl.float32).to(tl.bfloat16)
    tl.store(out + column.to(tl.int64) * RANK_PADDED + row, value, mask=column < num_columns)


@triton.jit
def project_kernel(
    tile_matrix,  # int32 (tiles,): row of the table
    tile_start,  # int32 (tiles,): first channel
    table,  # int64 (matrices, PROJECT_COLUMNS)
    gradients,  # int64 (matrices,): addresses
    projections,  # bf16 or fp32 (all columns, RANK_PADDED), unit variance
    out,  # fp32: the groups' buffers in one allocation
    inverse_root,  # 1 / sqrt(rank)
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # gradient is (contracted, channels) instead of (channels, contracted)
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in fp32
    G_TYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """R = G P / sqrt(rank) and the channel energies sum of G squared, in one read of G; accumulates in fp32.

    Channel c goes to row c % rows_per_block of block c // rows_per_block: the layout that a reduce-scatter needs.
    """
    tile = tl.program_id(0)
    matrix = tl.load(tile_matrix + tile).to(tl.int64)
    start = tl.load(tile_start + tile)
    row = table + matrix * PROJECT_COLUMNS
    channels = tl.load(row + 0).to(tl.int32)
    contracted = tl.load(row + 1).to(tl.int32)
    stride = tl.load(row + 2)
    projection_start = tl.load(row + 3)
    rows_per_block = tl.load(row + 4).to(tl.int32)
    projected_start = tl.load(row + 5)
    energy_start = tl.load(row + 6)
    block_stride = tl.load(row + 7)
    gradient = tl.load(gradients + matrix).to(tl.pointer_type(G_TYPE))
    if EVEN:
        start = tl.multiple_of(start, 16)
        channels = tl.multiple_of(channels, 16)
        contracted = tl.multiple_of(contracted, 16)

    channel = start + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, RANK_PADDED)
    c_inside = channel < channels
    if CHANNELS_LAST:
        pointers = gradient + k[:, None] * stride + channel[None, :]
        step = stride * BLOCK_K
        squares = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    else:
        pointers = gradient + channel[:, None].to(tl.int64) * stride + k[None, :]
        step = tl.full((), BLOCK_K, tl.int64)
        squares = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    p_pointers = projections + (projection_start + k[:, None]) * RANK_PADDED + r[None, :]
    acc = tl.zeros((BLOCK_C, RANK_PADDED), dtype=tl.float32)
    for first in range(0, contracted, BLOCK_K):
        k_inside = first + k < contracted
        inside = (k_inside[:, None] & c_inside[None, :]) if CHANNELS_LAST else (c_inside[:, None] & k_inside[None, :])
        if EVEN:
            pointers = tl.multiple_of(pointers, (16, 16))
        g = tl.load(pointers, mask=inside, other=0.0)
        p = tl.load(p_pointers, mask=k_inside[:, None], other=0.0)
        wide = g.to(tl.float32)
        squares += wide * wide
        if WIDE:
            g = wide
            p = p.to(tl.float32)
        # ieee: fp32 gradients must not be cut to tf32; it changes nothing for bf16
        if CHANNELS_LAST:
            acc = tl.dot(tl.trans(g), p, acc, input_precision="ieee")
        else:
            acc = tl.dot(g, p, acc, input_precision="ieee")
        pointers += step
        p_pointers += BLOCK_K * RANK_PADDED
    energy = tl.sum(squares, axis=0) if CHANNELS_LAST else tl.sum(squares, axis=1)
    block = (channel // rows_per_block).to(tl.int64) * block_stride
    within = (channel % rows_per_block).to(tl.int64)
    tl.store(out + energy_start + block + within, energy, mask=c_inside)
    target = out + projected_start + (block + within * RANK)[:, None] + r[None, :]
    tl.store(target, acc * inverse_root, mask=c_inside[:, None] & (r < RANK)[None, :])


@triton.jit
def rows_kernel(
    projected,  # fp32 (rows, RANK)
    exp_avg,  # fp32 (rows, RANK)
    exp_avg_sq,  # fp32 (rows, RANK)
    energy,  # fp32 (rows,): squared norms of the channels
    first,  # out, fp32 (rows,): SCALES: the channel's scale; else the squared norm of the adapted projection
    second,  # out, fp32 (rows,): SCALES: the squared norm of the scaled, clipped channel; else of the clipped projection
    clip,  # fp32, one element
    num_rows,
    beta1,
    beta2,
    eps,
    SCALES: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the step needs of each row of m / (sqrt(v) + eps) and of the clipped projection; the moments stay as they are."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RANK_PADDED)
    offset = row[:, None].to(tl.int64) * RANK + r[None, :]
    inside = (row < num_rows)[:, None] & (r < RANK)[None, :]
    clipping = tl.load(clip)
    g = tl.load(projected + offset, mask=inside, other=0.0) * clipping
    m = tl.load(exp_avg + offset, mask=inside, other=0.0) * beta1 + g * (1 - beta1)
    v = tl.load(exp_avg_sq + offset, mask=inside, other=0.0) * beta2 + g * g * (1 - beta2)
    adapted = m / (tl.sqrt(v) + eps)
    adapted_sq, projected_sq = tl.sum(adapted * adapted, axis=1), tl.sum(g * g, axis=1)
    if SCALES:
        scale = tl.sqrt(adapted_sq) / (tl.sqrt(projected_sq) + 1e-8)
        channel_sq = tl.load(energy + row, mask=row < num_rows, other=0.0)
        adapted_sq, projected_sq = scale, scale * scale * channel_sq * (clipping * clipping)
    tl.store(first + row, adapted_sq, mask=row < num_rows)
    tl.store(second + row, projected_sq, mask=row < num_rows)


@triton.jit
def commit_kernel(
    projected,  # fp32 (rows, RANK)
    exp_avg,  # fp32 (rows, RANK), updated
    exp_avg_sq,  # fp32 (rows, RANK), updated
    row_parameter,  # int32 (rows,): index of the parameter that a row belongs to
    write,  # int32 (parameters,): 1 where the moments move
    clip,  # fp32, one element
    num_rows,
    beta1,
    beta2,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the moments of the parameters to be written."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RANK_PADDED)
    parameter = tl.load(row_parameter + row, mask=row < num_rows, other=0)
    flag = tl.load(write + parameter, mask=row < num_rows, other=0) != 0
    offset = row[:, None].to(tl.int64) * RANK + r[None, :]
    inside = flag[:, None] & (r < RANK)[None, :]
    g = tl.load(projected + offset, mask=inside, other=0.0) * tl.load(clip)
    m = tl.load(exp_avg + offset, mask=inside, other=0.0) * beta1 + g * (1 - beta1)
    v = tl.load(exp_avg_sq + offset, mask=inside, other=0.0) * beta2 + g * g * (1 - beta2)
    tl.store(exp_avg + offset, m, mask=inside)
    tl.store(exp_avg_sq + offset, v, mask=inside)


@triton.jit
def _locate(
    tables,  # tile_piece, tile_row, tile_column, table, addresses: the pointers of write_kernel
    write,  # int32 (parameters,): the parameter has no rows here if its number is below MIN_FLAG
    MIN_FLAG: tl.constexpr,
    EVEN: tl.constexpr,
    REMAINDER: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What this program works on: entry of its piece in the table, parameter, local rows, columns and first column; then,
    (BLOCK_R, BLOCK_N), the mask of existing elements and pointers to weight, gradient and remainder."""
    tile_piece, tile_row, tile_column, table, addresses = tables
    tile = tl.program_id(0)
    piece = tl.load(tile_piece + tile).to(tl.int64)
    row = tl.load(tile_row + tile) + tl.arange(0, BLOCK_R)
    column0 = tl.load(tile_column + tile)
    if EVEN:
        column0 = tl.multiple_of(column0, 16)
    column = column0 + tl.arange(0, BLOCK_N)
    entry = table + piece * WRITE_COLUMNS
    parameter = tl.load(entry + 0)
    flag = tl.load(write + parameter) >= MIN_FLAG
    columns = tl.load(entry + 2).to(tl.int32)
    if EVEN:
        columns = tl.multiple_of(columns, 16)
    inside = (row < tl.where(flag, tl.load(entry + 1), 0))[:, None] & (column < columns)[None, :]
    wide = row[:, None].to(tl.int64)
    w = tl.load(entry + 3).to(tl.pointer_type(W_TYPE)) + (wide * tl.load(entry + 4) + column[None, :])
    g = tl.load(addresses + piece).to(tl.pointer_type(G_TYPE)) + (wide * tl.load(entry + 5) + column[None, :])
    rest_type: tl.constexpr = tl.int16 if REMAINDER == 16 else tl.int8
    rest = tl.load(entry + 6).to(tl.pointer_type(rest_type)) + (wide * tl.load(entry + 7) + column[None, :])
    if EVEN:
        w = tl.multiple_of(w, (16, 16))
        g = tl.multiple_of(g, (16, 16))
        rest = tl.multiple_of(rest, (16, 16))
    return entry, parameter, row, column, column0, inside, w, g, rest


@triton.jit
def _write(
    target,  # what _locate returns
    decay,
    change,  # fp32 (BLOCK_R, BLOCK_N)
    steps,  # int32 (parameters,): updates before this one
    EVEN: tl.constexpr,
    REMAINDER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """W <- round(decay W - change)."""
    entry, parameter, row, column, column0, inside, w_at, _, rest_at = target
    weight = tl.load(w_at, mask=inside, other=0.0)
    rest = tl.load(rest_at, mask=inside, other=0) if REMAINDER else weight
    value = join(weight, rest, REMAINDER) * decay - change
    random = weight
    if STOCHASTIC:
        step = tl.load(steps + parameter)
        random = random_bits(entry, row, column, column0, step, EVEN, BLOCK_R, BLOCK_N)
    store(w_at, rest_at, value, random, inside, REMAINDER, STOCHASTIC)


@triton.jit
def write_kernel(
    tile_piece,  # int32 (tiles,): row of the table
    tile_row,  # int32 (tiles,): first local row
    tile_column,  # int32 (tiles,): first local column
    table,  # int64 (pieces, WRITE_COLUMNS)
    addresses,  # int64 (pieces,): of the gradients
    scales,  # fp32: channel scales of all matrices
    coefficients,  # fp32 (parameters,)
    write,  # int32 (parameters,): 1 where the weight is written
    steps,  # int32 (parameters,): updates before this one
    decay,  # 1 - learning rate * weight decay
    CHANNELS_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    REMAINDER: tl.constexpr,  # bits of the remainders: 0 (none), 8 or 16
    STOCHASTIC: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """W <- round(decay W - coefficient * scale of the channel * G)."""
    tables = (tile_piece, tile_row, tile_column, table, addresses)
    target = _locate(tables, write, 1, EVEN, REMAINDER, W_TYPE, G_TYPE, BLOCK_R, BLOCK_N)
    entry, parameter, row, column, _, inside, _, g_at, _ = target
    local = column if CHANNELS_LAST else row
    channel = local + tl.load(entry + 11).to(tl.int32)
    per_block = tl.load(entry + 9).to(tl.int32)
    where = tl.load(entry + 8) + (channel // per_block) * tl.load(entry + 10) + channel % per_block
    valid = local < (tl.load(entry + 2) if CHANNELS_LAST else tl.load(entry + 1))
    factor = tl.load(scales + where, mask=valid, other=0.0) * tl.load(coefficients + parameter)
    by_channel = factor[None, :] if CHANNELS_LAST else factor[:, None]
    change = tl.load(g_at, mask=inside, other=0.0).to(tl.float32) * by_channel
    _write(target, decay, change, steps, EVEN, REMAINDER, STOCHASTIC, BLOCK_R, BLOCK_N)


@triton.jit
def adamw_kernel(
    tile_piece,  # these five as in write_kernel
    tile_row,
    tile_column,
    table,
    addresses,
    partial,  # fp32 (tiles,), out: squared norm of the tile's gradient (STAGE 0) or update (STAGE 1)
    write,  # int32 (parameters,): 1 where the weight is written
    steps,  # int32 (parameters,): updates before this one
    decays,  # fp32 (parameters,): 1 - learning rate * weight decay
    corrections,  # fp32 (2, parameters): 1 - beta ** step of both moments
    clip,  # fp32, one element
    num_parameters,
    learning_rate,
    beta1,
    beta2,
    eps,
    STAGE: tl.constexpr,  # 2: move the moments and write the weight
    EVEN: tl.constexpr,
    REMAINDER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """AdamW with fp32 moments in three passes: norm of the gradient, norm of the update, the update."""
    tile = tl.program_id(0)
    tables = (tile_piece, tile_row, tile_column, table, addresses)
    target = _locate(tables, write, 1 if STAGE == 2 else 0, EVEN, REMAINDER, W_TYPE, G_TYPE, BLOCK_R, BLOCK_N)
    entry, parameter, row, column, _, inside, _, g_at, _ = target
    gradient = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
    if STAGE == 0:
        tl.store(partial + tile, tl.sum(tl.sum(gradient * gradient, axis=1), axis=0))
    else:
        gradient = gradient * tl.load(clip)
        offset = row[:, None].to(tl.int64) * tl.load(entry + 10) + column[None, :]
        m_at = tl.load(entry + 8).to(tl.pointer_type(tl.float32)) + offset
        v_at = tl.load(entry + 9).to(tl.pointer_type(tl.float32)) + offset
        if EVEN:
            m_at = tl.multiple_of(m_at, (16, 16))
            v_at = tl.multiple_of(v_at, (16, 16))
        m = tl.load(m_at, mask=inside, other=0.0) * beta1 + gradient * (1 - beta1)
        v = tl.load(v_at, mask=inside, other=0.0) * beta2 + gradient * gradient * (1 - beta2)
        root = tl.sqrt(v / tl.load(corrections + num_parameters + parameter)) + eps
        update = m / tl.load(corrections + parameter) / root
        if STAGE == 1:
            update = tl.where(inside, update, 0.0)
            tl.store(partial + tile, tl.sum(tl.sum(update * update, axis=1), axis=0))
        else:
            tl.store(m_at, m, mask=inside)
            tl.store(v_at, v, mask=inside)
            decay = tl.load(decays + parameter)
            _write(target, decay, update * learning_rate, steps, EVEN, REMAINDER, STOCHASTIC, BLOCK_R, BLOCK_N)
