"""Building blocks of the linear attention kernels: feature maps, tiles, moments, rows times state.

The state is kept transposed, S^T = sum_j v_j phi(k_j)^T of (E, D): values then go from memory to
the tensor cores without passing registers, and only the keys meet their feature map there.

A head of D channels is held as two power-of-two parts D0 + D1 >= D (72 = 64 + 16, 288 = 256 + 32;
D1 = 0 if one part does), and E likewise, so that a state has up to four blocks: s10 is part 1 of
the E rows by part 0 of the D columns. Blocks of an absent part are scalars that nothing reads.
Every function masks the padding.
"""

import triton
import triton.language as tl


@triton.jit
def feature(x, FEATURE: tl.constexpr):
    """phi(x) in the dtype of x. A new feature map is a branch here and one in `feature_grad`, and
    `load_features` must know it if phi(0) is not 0."""
    if FEATURE == "relu":
        # One use of x, so that its load may go to shared memory directly; NaN as in PyTorch.
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
    elif FEATURE == "relu_packed":
        # The same on two halves at once; Triton itself goes through float32.
        if x.dtype == tl.bfloat16:
            y = tl.inline_asm_elementwise(
                "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }",
                "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            y = tl.inline_asm_elementwise(
                "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.f16x2 $0, $1, zero; }",
                "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2,
            )  # fmt: skip
    elif FEATURE == "elu1":
        wide = x.to(tl.float32)
        y = tl.where(wide > 0, wide + 1, tl.exp(wide)).to(x.dtype)
    else:
        tl.static_assert(FEATURE == "identity")
        y = x
    return y


@triton.jit
def feature_grad(x, d_phi, FEATURE: tl.constexpr):
    """Gradient of x in float32 from that of phi(x)."""
    if FEATURE == "relu" or FEATURE == "relu_packed":
        dx = tl.where(x > 0, d_phi, 0.0)
    elif FEATURE == "elu1":
        wide = x.to(tl.float32)
        dx = tl.where(wide > 0, d_phi, d_phi * tl.exp(wide))
    else:
        tl.static_assert(FEATURE == "identity")
        dx = d_phi
    return dx


@triton.jit
def load_tile(p_x, o_row, m_row, column, COLUMNS, WIDTH: tl.constexpr):
    """Rows at element offsets `o_row`, columns `column` .. + WIDTH; zeros from COLUMNS on."""
    o_column = column + tl.arange(0, WIDTH)
    mask = m_row[:, None] & (o_column[None, :] < COLUMNS)
    return tl.load(p_x + o_row[:, None] + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def load_features(p_x, o_row, m_row, column, COLUMNS, WIDTH: tl.constexpr, FEATURE: tl.constexpr):
    """phi of a tile of rows; the padding of the channels is zero, also where phi(0) is not."""
    x = feature(load_tile(p_x, o_row, m_row, column, COLUMNS, WIDTH), FEATURE)
    if FEATURE == "elu1" and column + WIDTH > COLUMNS:
        o_column = column + tl.arange(0, WIDTH)
        x = tl.where(o_column[None, :] < COLUMNS, x, 0.0).to(p_x.dtype.element_ty)
    return x


@triton.jit
def store_tile(p_x, o_row, m_row, column, values, COLUMNS, WIDTH: tl.constexpr):
    o_column = column + tl.arange(0, WIDTH)
    mask = m_row[:, None] & (o_column[None, :] < COLUMNS)
    values = values.to(p_x.dtype.element_ty)
    tl.store(p_x + o_row[:, None] + o_column[None, :], values, mask=mask)


@triton.jit
def load_vector(p_x, first, COLUMNS, WIDTH: tl.constexpr):
    o_column = first + tl.arange(0, WIDTH)
    return tl.load(p_x + o_column, mask=o_column < COLUMNS, other=0.0)


@triton.jit
def store_vector(p_x, first, values, COLUMNS, WIDTH: tl.constexpr):
    o_column = first + tl.arange(0, WIDTH)
    tl.store(p_x + o_column, values, mask=o_column < COLUMNS)


@triton.jit
def shift_of(p_x, stride, count, column, COLUMNS, WIDTH: tl.constexpr, FEATURE: tl.constexpr):
    """Mean of phi over the first rows: near the mean of all, which is all that centring needs; the
    nearer, the fewer digits of float32 the sums lose."""
    ROWS: tl.constexpr = 64 if p_x.dtype.element_ty == tl.float32 else 16
    o_n = tl.arange(0, ROWS)
    m_n = o_n < count
    x = load_tile(p_x, o_n.to(tl.int64) * stride, m_n, column, COLUMNS, WIDTH)
    x = tl.where(m_n[:, None], feature(x, FEATURE).to(tl.float32), 0.0)
    return tl.sum(x, 0) / tl.minimum(count, ROWS).to(tl.float32)


@triton.jit
def shifts_of(
    p_x, stride, count, COLUMNS, W0: tl.constexpr, W1: tl.constexpr, FEATURE: tl.constexpr
):
    """Both parts of the shift of phi(k). A covariance needs only one side centred. float32 centres
    the other too (`value_shifts_of`); halves leave v as it is: its sum must be exact, and half
    differences are rounded with a bias that adds up over tokens."""
    x1 = 0.0
    x0 = shift_of(p_x, stride, count, 0, COLUMNS, W0, FEATURE)
    if W1 > 0:
        x1 = shift_of(p_x, stride, count, W0, COLUMNS, W1, FEATURE)
    return x0, x1


@triton.jit
def value_shifts_of(
    p_x, stride, count, COLUMNS, W0: tl.constexpr, W1: tl.constexpr, SHIFTED: tl.constexpr
):
    """Both parts of the shift of v: zeros unless SHIFTED or v is float32."""
    x0 = tl.zeros((W0,), tl.float32)
    x1 = 0.0
    if W1 > 0:
        x1 = tl.zeros((W1,), tl.float32)
    if SHIFTED or p_x.dtype.element_ty == tl.float32:
        x0, x1 = shifts_of(p_x, stride, count, COLUMNS, W0, W1, "identity")
    return x0, x1


@triton.jit
def gain_rows(m_n, gain, GAINED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """(16, BLOCK) operand whose product with rows x_j, summed over its rows, is sum_j gain_j x_j.

    The tensor cores then do the sums over tokens. A gain is two rows, its leading bits and the
    rest, so that half operands keep 16 bits of it.
    """
    o_row = tl.arange(0, 16)[:, None]
    if GAINED:
        high = gain.to(tl.bfloat16).to(tl.float32)
        low = gain - high
        rows = tl.where(o_row == 0, high[None, :], tl.where(o_row == 1, low[None, :], 0.0))
    else:
        rows = tl.where((o_row == 0) & m_n[None, :], 1.0, 0.0)
    return rows.to(DTYPE)


@triton.constexpr_function
def folds(summed, width, part0, part1, dtype):
    """Whether `fold_gains` finds two columns of padding; float32 sums by `add_rows` alone."""
    return summed and part1 > 0 and part0 + part1 >= width + 2 and dtype != tl.float32


@triton.jit
def fold_gains(v1, m_n, gain, TAIL: tl.constexpr, E1: tl.constexpr, GAINED: tl.constexpr):
    """The tail of v with the gains of `gain_rows` in its first two columns of padding: the product
    with phi(k) that gives the tail of the state then gives z as well."""
    o_column = tl.arange(0, E1)[None, :]
    wide = v1.to(tl.float32)
    if GAINED:
        high = gain.to(tl.bfloat16).to(tl.float32)
        low = gain - high
        wide = tl.where(o_column == TAIL, high[:, None], wide)
        wide = tl.where(o_column == TAIL + 1, low[:, None], wide)
    else:
        wide = tl.where((o_column == TAIL) & m_n[:, None], 1.0, wide)
    return wide.to(v1.dtype)


@triton.jit
def empty_moments(
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    SUM_K: tl.constexpr, SUM_V: tl.constexpr,
):  # fmt: skip
    s00 = tl.zeros((E0, D0), tl.float32)
    s01, s10, s11, z0, z1, a0, a1 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if D1 > 0:
        s01 = tl.zeros((E0, D1), tl.float32)
    if E1 > 0:
        s10 = tl.zeros((E1, D0), tl.float32)
    if D1 > 0 and E1 > 0:
        s11 = tl.zeros((E1, D1), tl.float32)
    if SUM_K:
        z0 = tl.zeros((16, D0), tl.float32)
    if SUM_K and D1 > 0:
        z1 = tl.zeros((16, D1), tl.float32)
    if SUM_V:
        a0 = tl.zeros((16, E0), tl.float32)
    if SUM_V and E1 > 0:
        a1 = tl.zeros((16, E1), tl.float32)
    return s00, s01, s10, s11, z0, z1, a0, a1


@triton.jit
def add_rows(total, gains, x, PRECISION: tl.constexpr):
    """total + gains x, of (16, WIDTH); only the sum of the rows has a meaning.

    A sum that grows with the tokens loses digits of float32 at every step, more than halves have.
    For float32 the first row is the sum and the second what its rounding cost (Kahan's sum).
    """
    if x.dtype == tl.float32 and PRECISION == "ieee":
        o_row = tl.arange(0, 16)[:, None]
        step = tl.sum(tl.sum(gains, 0)[:, None] * x, 0)
        old = tl.sum(tl.where(o_row == 0, total, 0.0), 0)
        step += tl.sum(tl.where(o_row == 1, total, 0.0), 0)
        new = old + step
        rest = step - (new - old)
        y = tl.where(o_row == 0, new[None, :], tl.where(o_row == 1, rest[None, :], 0.0))
    else:
        y = tl.dot(gains, x, total, input_precision=PRECISION)
    return y


@triton.jit
def moment_step(
    k0, k1, v0, v1, gains,
    s00, s01, s10, s11, z0, z1, a0, a1,
    D1: tl.constexpr, E1: tl.constexpr,
    SUM_K: tl.constexpr, SUM_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds v^T k to the state, gains k to z and gains v to a. SUM_K is False where the gains ride
    on the tail of v."""
    s00 = tl.dot(tl.trans(v0), k0, s00, input_precision=PRECISION)
    if D1 > 0:
        s01 = tl.dot(tl.trans(v0), k1, s01, input_precision=PRECISION)
    if E1 > 0:
        s10 = tl.dot(tl.trans(v1), k0, s10, input_precision=PRECISION)
        if D1 > 0:
            s11 = tl.dot(tl.trans(v1), k1, s11, input_precision=PRECISION)
    if SUM_K:
        z0 = add_rows(z0, gains, k0, PRECISION)
        if D1 > 0:
            z1 = add_rows(z1, gains, k1, PRECISION)
    if SUM_V:
        a0 = add_rows(a0, gains, v0, PRECISION)
        if E1 > 0:
            a1 = add_rows(a1, gains, v1, PRECISION)
    return s00, s01, s10, s11, z0, z1, a0, a1


@triton.jit
def sum_rows(
    s10, s11, z0, z1, a0, a1, TAIL,
    D1: tl.constexpr, E1: tl.constexpr,
    FOLD: tl.constexpr, SUM_K: tl.constexpr, SUM_V: tl.constexpr,
):  # fmt: skip
    """z and a as vectors: `moment_step` keeps them as 16 rows each, or z in the tail of S^T."""
    if FOLD:
        padding = (tl.arange(0, E1) >= TAIL)[:, None]
        z0 = tl.sum(tl.where(padding, s10, 0.0), 0)
        if D1 > 0:
            z1 = tl.sum(tl.where(padding, s11, 0.0), 0)
    elif SUM_K:
        z0 = tl.sum(z0, 0)
        if D1 > 0:
            z1 = tl.sum(z1, 0)
    if SUM_V:
        a0 = tl.sum(a0, 0)
        if E1 > 0:
            a1 = tl.sum(a1, 0)
    return z0, z1, a0, a1


@triton.jit
def centre(s00, s01, s10, s11, z0, z1, a0, a1, count, D1: tl.constexpr, E1: tl.constexpr):
    """sum (v - mean v) (phi - mean phi)^T from the sum around the shifts and the sums z, a."""
    s00 -= a0[:, None] * (z0 / count)[None, :]
    if D1 > 0:
        s01 -= a0[:, None] * (z1 / count)[None, :]
    if E1 > 0:
        s10 -= a1[:, None] * (z0 / count)[None, :]
        if D1 > 0:
            s11 -= a1[:, None] * (z1 / count)[None, :]
    return s00, s01, s10, s11


@triton.jit
def scale_cast(s00, s01, s10, s11, factor, DTYPE: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr):
    """The one cast of a state to what the tensor cores take."""
    s00 = (s00 * factor).to(DTYPE)
    if D1 > 0:
        s01 = (s01 * factor).to(DTYPE)
    if E1 > 0:
        s10 = (s10 * factor).to(DTYPE)
        if D1 > 0:
            s11 = (s11 * factor).to(DTYPE)
    return s00, s01, s10, s11


@triton.jit
def moments(
    p_k, p_v, p_weight, p_gain, k_stride, v_stride, start, stop, ck0, ck1, cv0, cv1,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr,
    SUM_K: tl.constexpr, SUM_V: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens start <= j < stop, all float32:

    S^T = sum (v_j - cv) x_j^T, z = sum g_j x_j, a = sum (v_j - cv) with x_j = w_j phi(k_j) - ck;
    ck = 0 unless CENTRED, w = g = 1 unless WEIGHTED; cv = 0 unless SHIFTED, or CENTRED in float32.
    """
    EXACT: tl.constexpr = not (CENTRED or SHIFTED or WEIGHTED)
    DTYPE: tl.constexpr = tl.float32 if WIDE and not EXACT else p_k.dtype.element_ty
    SHIFT_V: tl.constexpr = SHIFTED or (CENTRED and p_k.dtype.element_ty == tl.float32)
    PRECISION: tl.constexpr = "tf32" if WIDE else "ieee"
    OWN: tl.constexpr = SUM_K and not FOLD
    s00, s01, s10, s11, z0, z1, a0, a1 = empty_moments(D0, D1, E0, E1, OWN, SUM_V)
    for n in range(start, stop, BLOCK):
        k1, v1, gain = 0.0, 0.0, 0.0
        o_n = n + tl.arange(0, BLOCK)
        m_n = o_n < stop
        o_k = o_n.to(tl.int64) * k_stride
        o_v = o_n.to(tl.int64) * v_stride
        k0 = load_features(p_k, o_k, m_n, 0, D, D0, FEATURE)
        v0 = load_tile(p_v, o_v, m_n, 0, E, E0)
        if D1 > 0:
            k1 = load_features(p_k, o_k, m_n, D0, D, D1, FEATURE)
        if E1 > 0:
            v1 = load_tile(p_v, o_v, m_n, E0, E, E1)
        if CENTRED:
            # Masked rows are not zero any more; on the side of v they must be.
            k0 = k0.to(tl.float32) - ck0[None, :]
            if D1 > 0:
                k1 = k1.to(tl.float32) - ck1[None, :]
        if SHIFT_V:
            v0 = tl.where(m_n[:, None], v0.to(tl.float32) - cv0[None, :], 0.0)
            if E1 > 0:
                v1 = tl.where(m_n[:, None], v1.to(tl.float32) - cv1[None, :], 0.0)
        if WEIGHTED:
            weight = tl.load(p_weight + o_n, mask=m_n, other=0.0)
            gain = tl.load(p_gain + o_n, mask=m_n, other=0.0)
            k0 = k0.to(tl.float32) * weight[:, None]
            if D1 > 0:
                k1 = k1.to(tl.float32) * weight[:, None]
        k0, v0 = k0.to(DTYPE), v0.to(DTYPE)
        if D1 > 0:
            k1 = k1.to(DTYPE)
        if E1 > 0:
            v1 = v1.to(DTYPE)
        gains = gain_rows(m_n, gain, WEIGHTED, DTYPE, BLOCK)
        if FOLD:
            v1 = fold_gains(v1, m_n, gain, E - E0, E1, WEIGHTED)
        s00, s01, s10, s11, z0, z1, a0, a1 = moment_step(
            k0, k1, v0, v1, gains, s00, s01, s10, s11, z0, z1, a0, a1,
            D1, E1, OWN, SUM_V, PRECISION,
        )  # fmt: skip
    z0, z1, a0, a1 = sum_rows(s10, s11, z0, z1, a0, a1, E - E0, D1, E1, FOLD, SUM_K, SUM_V)
    return s00, s01, s10, s11, z0, z1, a0, a1


@triton.jit
def load_state(
    p_state, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """All blocks of one stored state (E, D)."""
    s01, s10, s11 = 0.0, 0.0, 0.0
    o_e0 = tl.arange(0, E0)
    s00 = load_tile(p_state, o_e0 * D, o_e0 < E, 0, D, D0).to(DTYPE)
    if D1 > 0:
        s01 = load_tile(p_state, o_e0 * D, o_e0 < E, D0, D, D1).to(DTYPE)
    if E1 > 0:
        o_e1 = E0 + tl.arange(0, E1)
        s10 = load_tile(p_state, o_e1 * D, o_e1 < E, 0, D, D0).to(DTYPE)
        if D1 > 0:
            s11 = load_tile(p_state, o_e1 * D, o_e1 < E, D0, D, D1).to(DTYPE)
    return s00, s01, s10, s11


@triton.jit
def store_state(
    p_state, s00, s01, s10, s11, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E, E0: tl.constexpr, E1: tl.constexpr,
):  # fmt: skip
    """All blocks of a state; E rows from `p_state` on."""
    o_e0 = tl.arange(0, E0)
    store_tile(p_state, o_e0 * D, o_e0 < E, 0, s00, D, D0)
    if D1 > 0:
        store_tile(p_state, o_e0 * D, o_e0 < E, D0, s01, D, D1)
    if E1 > 0:
        o_e1 = E0 + tl.arange(0, E1)
        store_tile(p_state, o_e1 * D, o_e1 < E, 0, s10, D, D0)
        if D1 > 0:
            store_tile(p_state, o_e1 * D, o_e1 < E, D0, s11, D, D1)


@triton.jit
def load_vectors(p_x, COLUMNS, W0: tl.constexpr, W1: tl.constexpr):
    """Both parts of one float32 vector."""
    x1 = 0.0
    x0 = load_vector(p_x, 0, COLUMNS, W0)
    if W1 > 0:
        x1 = load_vector(p_x, W0, COLUMNS, W1)
    return x0, x1


@triton.jit
def store_vectors(p_x, x0, x1, COLUMNS, W0: tl.constexpr, W1: tl.constexpr):
    store_vector(p_x, 0, x0, COLUMNS, W0)
    if W1 > 0:
        store_vector(p_x, W0, x1, COLUMNS, W1)


@triton.jit
def rows_times(x0, x1, w0, w1, X1: tl.constexpr, PRECISION: tl.constexpr):
    """x0 @ w0^T + x1 @ w1^T, the second only if X1 > 0."""
    y = tl.dot(x0, tl.trans(w0), input_precision=PRECISION)
    if X1 > 0:
        y = tl.dot(x1, tl.trans(w1), y, input_precision=PRECISION)
    return y


@triton.jit
def rows_times_rows(x0, x1, w0, w1, X1: tl.constexpr, PRECISION: tl.constexpr):
    """x0 @ w0 + x1 @ w1, the second only if X1 > 0."""
    y = tl.dot(x0, w0, input_precision=PRECISION)
    if X1 > 0:
        y = tl.dot(x1, w1, y, input_precision=PRECISION)
    return y


@triton.jit
def row_dot(x0, x1, y0, y1, X1: tl.constexpr):
    """x_i . y_i of the rows of two tiles, in float32."""
    total = tl.sum(x0.to(tl.float32) * y0, 1)
    if X1 > 0:
        total += tl.sum(x1.to(tl.float32) * y1, 1)
    return total


@triton.jit
def rows_dot_vector(x0, x1, z0, z1, X1: tl.constexpr):
    """x_i . z of the rows of a tile with one vector, in float32."""
    total = tl.sum(x0.to(tl.float32) * z0[None, :], 1)
    if X1 > 0:
        total += tl.sum(x1.to(tl.float32) * z1[None, :], 1)
    return total


@triton.jit
def rows_times_state(
    p_x, p_state, p_centre, p_dot, o_row, m_row, reduce_stride, out_stride,
    REDUCE: tl.constexpr, OUT: tl.constexpr, OUT0: tl.constexpr, OUT1: tl.constexpr,
    FEATURE: tl.constexpr, CENTRED: tl.constexpr, WITH_DOT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(phi(x) - centre) @ state for one tile of rows, all OUT columns, REDUCE channels in steps.

    With WITH_DOT also phi(x) . dot, the denominator of the ratio. The strides tell whether the
    state is read as it is or transposed.
    """
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_x.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if WIDE else "ieee"
    y0 = tl.zeros((BLOCK, OUT0), tl.float32)
    y1, total = 0.0, 0.0
    if OUT1 > 0:
        y1 = tl.zeros((BLOCK, OUT1), tl.float32)
    if WITH_DOT:
        total = tl.zeros((BLOCK,), tl.float32)
    o_out0 = tl.arange(0, OUT0)
    for r in range(0, REDUCE, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        m_r = o_r < REDUCE
        x = tl.load(
            p_x + o_row[:, None] + o_r[None, :], mask=m_row[:, None] & m_r[None, :], other=0.0
        )
        x = feature(x, FEATURE)
        if WITH_DOT:
            # Padding of elu1 is not zero, but meets zeros of `dot` and of the state.
            z = tl.load(p_dot + o_r, mask=m_r, other=0.0)
            total += tl.sum(x.to(tl.float32) * z[None, :], 1)
        if CENTRED:
            x = x.to(tl.float32) - tl.load(p_centre + o_r, mask=m_r, other=0.0)[None, :]
        x = x.to(DTYPE)
        p_block = p_state + o_r[:, None] * reduce_stride
        w0 = tl.load(
            p_block + o_out0[None, :] * out_stride,
            mask=m_r[:, None] & (o_out0[None, :] < OUT),
            other=0.0,
        )
        y0 = tl.dot(x, w0.to(DTYPE), y0, input_precision=PRECISION)
        if OUT1 > 0:
            o_out1 = OUT0 + tl.arange(0, OUT1)
            w1 = tl.load(
                p_block + o_out1[None, :] * out_stride,
                mask=m_r[:, None] & (o_out1[None, :] < OUT),
                other=0.0,
            )
            y1 = tl.dot(x, w1.to(DTYPE), y1, input_precision=PRECISION)
    return y0, y1, total
