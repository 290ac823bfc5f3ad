"""Triton kernels of BatchNorm + LeakyReLU: statistics, application, and their gradients.

Two passes: `statistics` leaves partial means, `apply` merges them, normalises and activates; the
gradient likewise by `sums` and `apply_gradient`: 3 and 5 element-passes, whatever the size. Where a
channel fits on chip, `whole` and `whole_gradient` read it once: 2 and 3. Nothing is stored but the
output: the sign of z = scale (x - mean) + bias is computed again by the same fused multiply-add.
No atomics: the same numbers each time.

A tile is (rows, columns): (images, pixels) of one channel in NCHW, (pixels of all images,
channels) in NHWC; a group is a channel, or a block of channels. Partial results have the shape
(quantity, split, channel).
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(16)  # partial results that are merged at a time


@triton.jit
def place(tile, group, N, C, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """Offsets of a tile's elements, and which of them exist."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if LAST:
        row, column = tile * ROWS + rows, group * COLUMNS + columns
        return row.to(tl.int64) * C + column, (row < N * S) & (column < C)
    across = tl.cdiv(S, COLUMNS)
    row, column = (tile // across) * ROWS + rows, (tile % across) * COLUMNS + columns
    return (row.to(tl.int64) * C + group) * S + column, (row < N) & (column < S)


@triton.jit
def channels(group, C, COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """A group's channels, and which of them exist: (1, columns), or (1, 1)."""
    if LAST:
        channel = group * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    else:
        channel = group + tl.zeros((1, 1), tl.int32)
    return channel, channel < C


@triton.jit
def fold(tile, LAST: tl.constexpr):
    """Sum over what belongs to one channel."""
    down = tl.sum(tile, 0, keep_dims=True)
    return down if LAST else tl.sum(down, 1, keep_dims=True)


@triton.jit
def moments(count, mean, m2, LAST: tl.constexpr):
    """Moments of everything from the moments of lanes (Chan, Golub and LeVeque 1983, equation
    1.5); the mean is taken about a first estimate of itself, which keeps its digits."""
    total = fold(count, LAST)
    divisor = tl.maximum(total, 1.0)
    first = fold(count * mean, LAST) / divisor
    whole = first + fold(count * (mean - first), LAST) / divisor
    return total, whole, fold(m2 + count * (mean - whole) * (mean - whole), LAST)


@triton.jit
def merged_moments(part, channel, exists, splits, C, COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """Count, mean and M2 of these channels over all splits."""
    width: tl.constexpr = COLUMNS if LAST else 1
    count = tl.zeros((CHUNK, width), tl.float32)
    mean, m2 = count, count
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)[:, None]
        at, there = part + split * C + channel, exists & (split < splits)
        n = tl.load(at, there, 0.0)
        m = tl.load(at + splits * C, there, 0.0)
        both = count + n
        delta, share = m - mean, n / tl.maximum(both, 1.0)
        m2 += tl.load(at + 2 * splits * C, there, 0.0) + delta * delta * count * share
        mean += delta * share
        count = both
    return moments(count, mean, m2, True)


@triton.jit
def merged_sums(part, channel, exists, splits, C, COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """Two sums for these channels over all splits."""
    width: tl.constexpr = COLUMNS if LAST else 1
    one = tl.zeros((CHUNK, width), tl.float32)
    two = one
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)[:, None]
        at, there = part + split * C + channel, exists & (split < splits)
        one += tl.load(at, there, 0.0)
        two += tl.load(at + splits * C, there, 0.0)
    return tl.sum(one, 0, keep_dims=True), tl.sum(two, 0, keep_dims=True)


@triton.jit
def affine(weight, bias, channel, exists, AFFINE: tl.constexpr):
    """Scale and shift of these channels."""
    if AFFINE:
        w, b = tl.load(weight + channel, exists, 0.0), tl.load(bias + channel, exists, 0.0)
    else:
        w, b = tl.full((1, 1), 1.0, tl.float32), tl.full((1, 1), 0.0, tl.float32)
    return w, b


@triton.jit
def known(stats, weight, bias, channel, exists, C, AFFINE: tl.constexpr, OUTPUT: tl.constexpr):
    """Mean, 1/std, scale and shift of these channels; no scale of 0 where OUTPUT divides by it."""
    mean, rstd = tl.load(stats + channel, exists, 0.0), tl.load(stats + C + channel, exists, 0.0)
    w, b = affine(weight, bias, channel, exists, AFFINE)
    if OUTPUT:
        w = tl.where(exists, w, 1.0)
    return mean, rstd, w, b


@triton.jit
def activate(z, slope):
    return tl.where(z > 0, z, z * slope)


@triton.jit
def judge(saved, dy, mean, rstd, w, b, slope, OUTPUT: tl.constexpr):
    """Normalised input and gradient before the activation, from the input or from the output."""
    if OUTPUT:
        z = tl.where(saved > 0, saved, saved * (1.0 / slope))
        xhat = (z - b) * (1.0 / w)
    else:
        z = tl.fma(saved - mean, w * rstd, b)
        xhat = (saved - mean) * rstd
    return xhat, tl.where(z > 0, dy, dy * slope)


@triton.jit
def statistics(
    x, part, N, C, S, tiles, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of each split: Welford 1962 in every lane."""
    group, split = tl.program_id(0), tl.program_id(1)
    count = tl.zeros((ROWS, COLUMNS), tl.float32)
    mean, m2, done = count, count, 0.0
    for tile in range(split, tiles, splits):
        offset, mask = place(tile, group, N, C, S, ROWS, COLUMNS, LAST)
        if EVEN:  # one division per tile, not per element
            v = tl.load(x + offset).to(tl.float32)
            done += 1.0
            delta = v - mean
            mean += delta * (1.0 / done)
            m2 += delta * (v - mean)
        else:
            v = tl.load(x + offset, mask, 0.0).to(tl.float32)
            count += tl.where(mask, 1.0, 0.0)
            delta = tl.where(mask, v - mean, 0.0)
            mean += delta / tl.maximum(count, 1.0)
            m2 += delta * (v - mean)
    if EVEN:
        count += done
    total, whole, square = moments(count, mean, m2, LAST)
    channel, exists = channels(group, C, COLUMNS, LAST)
    at = part + split * C + channel
    tl.store(at, total, exists)
    tl.store(at + splits * C, whole, exists)
    tl.store(at + 2 * splits * C, square, exists)


@triton.jit
def apply(
    x, y, part, weight, bias, stats, N, C, S, tiles, parts, eps, slope,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """y = LeakyReLU(BatchNorm(x)). MERGE: statistics from `parts` partial ones, kept in `stats`
    (mean, 1/std, variance; 3 x C); otherwise they are there. From the last tile to the first: the
    last ones of the pass before are still in the L2 cache."""
    group, split = tl.program_id(0), tl.program_id(1)
    channel, exists = channels(group, C, COLUMNS, LAST)
    if MERGE:
        total, mean, m2 = merged_moments(part, channel, exists, parts, C, COLUMNS, LAST)
        variance = m2 / tl.maximum(total, 1.0)
        rstd = tl.rsqrt(variance + eps)
        first = exists & (channel * 0 + split == 0)
        tl.store(stats + channel, mean, first)
        tl.store(stats + C + channel, rstd, first)
        tl.store(stats + 2 * C + channel, variance, first)
    else:
        mean = tl.load(stats + channel, exists, 0.0)
        rstd = tl.load(stats + C + channel, exists, 0.0)
    w, b = affine(weight, bias, channel, exists, AFFINE)
    for i in range(split, tiles, tl.num_programs(1)):
        offset, mask = place(tiles - 1 - i, group, N, C, S, ROWS, COLUMNS, LAST)
        v = tl.load(x + offset, mask, 0.0).to(tl.float32)
        tl.store(y + offset, activate(tl.fma(v - mean, w * rstd, b), slope), mask)


@triton.jit
def sums(
    saved, dy, dx, part, weight, bias, stats, N, C, S, tiles, slope,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr,
    OUTPUT: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Partial sums of dz and dz * xhat. FIXED statistics (eval mode): dx too, which needs none."""
    group, split = tl.program_id(0), tl.program_id(1)
    channel, exists = channels(group, C, COLUMNS, LAST)
    mean, rstd, w, b = known(stats, weight, bias, channel, exists, C, AFFINE, OUTPUT)
    one = tl.zeros((ROWS, COLUMNS), tl.float32)
    two = one
    for tile in range(split, tiles, tl.num_programs(1)):
        offset, mask = place(tile, group, N, C, S, ROWS, COLUMNS, LAST)
        v = tl.load(saved + offset, mask, 0.0).to(tl.float32)
        g = tl.load(dy + offset, mask, 0.0).to(tl.float32)
        xhat, dz = judge(v, g, mean, rstd, w, b, slope, OUTPUT)
        one += dz
        two += tl.where(mask, dz * xhat, 0.0)
        if FIXED:
            tl.store(dx + offset, dz * (w * rstd), mask)
    at, splits = part + split * C + channel, tl.num_programs(1)
    tl.store(at, fold(one, LAST), exists)
    tl.store(at + splits * C, fold(two, LAST), exists)


@triton.jit
def apply_gradient(
    saved, dy, dx, part, weight, bias, stats, gradients, count, N, C, S, tiles, parts, slope,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr,
    OUTPUT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """dx = w / std (dz - mean(dz) - xhat mean(dz xhat)) (Ioffe and Szegedy 2015, section 3), and
    (dw, db) in `gradients`. SHARED: `count` is a tensor, that of all ranks."""
    group, split = tl.program_id(0), tl.program_id(1)
    channel, exists = channels(group, C, COLUMNS, LAST)
    mean, rstd, w, b = known(stats, weight, bias, channel, exists, C, AFFINE, OUTPUT)
    db, dw = merged_sums(part, channel, exists, parts, C, COLUMNS, LAST)
    first = exists & (channel * 0 + split == 0)
    tl.store(gradients + channel, dw, first)
    tl.store(gradients + C + channel, db, first)
    n = tl.load(count) if SHARED else count * 1.0
    db_share, dw_share = db / n, dw / n
    for i in range(split, tiles, tl.num_programs(1)):
        offset, mask = place(tiles - 1 - i, group, N, C, S, ROWS, COLUMNS, LAST)
        v = tl.load(saved + offset, mask, 0.0).to(tl.float32)
        g = tl.load(dy + offset, mask, 0.0).to(tl.float32)
        xhat, dz = judge(v, g, mean, rstd, w, b, slope, OUTPUT)
        tl.store(dx + offset, (dz - db_share - xhat * dw_share) * (w * rstd), mask)


@triton.jit
def whole(
    x, y, weight, bias, stats, N, C, S, eps, slope,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """`statistics` and `apply` on a channel (NCHW) that is held on chip: one tile is all of it."""
    channel = tl.program_id(0)
    offset, mask = place(0, channel, N, C, S, ROWS, COLUMNS, False)
    v = tl.load(x + offset, mask, 0.0).to(tl.float32)
    n = (N * S) * 1.0
    first = tl.sum(v) / n
    mean = first + tl.sum(tl.where(mask, v - first, 0.0)) / n
    centred = tl.where(mask, v - mean, 0.0)
    variance = tl.sum(centred * centred) / n
    rstd = tl.rsqrt(variance + eps)
    tl.store(stats + channel, mean)
    tl.store(stats + C + channel, rstd)
    tl.store(stats + 2 * C + channel, variance)
    w, b = affine(weight, bias, channel, True, AFFINE)
    tl.store(y + offset, activate(tl.fma(v - mean, w * rstd, b), slope), mask)


@triton.jit
def whole_gradient(
    saved, dy, dx, weight, bias, stats, gradients, N, C, S, slope,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AFFINE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """`sums` and `apply_gradient` on a channel (NCHW) that is held on chip."""
    channel = tl.program_id(0)
    offset, mask = place(0, channel, N, C, S, ROWS, COLUMNS, False)
    v = tl.load(saved + offset, mask, 0.0).to(tl.float32)
    g = tl.load(dy + offset, mask, 0.0).to(tl.float32)
    mean, rstd = tl.load(stats + channel), tl.load(stats + C + channel)
    w, b = affine(weight, bias, channel, True, AFFINE)
    xhat, dz = judge(v, g, mean, rstd, w, b, slope, OUTPUT)
    db, dw = tl.sum(dz), tl.sum(tl.where(mask, dz * xhat, 0.0))
    tl.store(gradients + channel, dw)
    tl.store(gradients + C + channel, db)
    n = (N * S) * 1.0
    tl.store(dx + offset, (dz - db / n - xhat * (dw / n)) * (w * rstd), mask)
