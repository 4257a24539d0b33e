"""Triton kernels of the mLSTM. `triton_mlstm.py` explains the method, prepares their inputs and calls them.

Vectors of a token are DH numbers in a tensor laid out (B, S, NH, DH); numbers of a token are laid out (B * NH, S) in the order
of the scan. A kernel walks the scan from place 0 on; `REVERSE` only says which token stands at a place.

Letters of the shapes: `R` rows, the tokens of a block that reads; `T` columns, the tokens of a block that is read; `W` channels
of a tile. Products of tiles are accumulated in float32, and so is everything else, but for sums of gates, whose differences
matter: those are taken in float64.
"""

# Triton's kernels are no Python functions: their arguments have no types that a checker knows.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

import triton
import triton.language as tl


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    """Matrix product, summed up in float32; `interpreted` is exact, too, and used where Triton's interpreter is."""
    if PRECISION == "interpreted":  # it (3.9) mistakes the bits of bfloat16 for integers here
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _vectors(ptr, places, first, seq_len, heads, DH: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Channels `first` to `first + WIDTH` of the tokens at `places`, (R, W); zeros outside."""
    tokens = places
    if REVERSE:
        tokens = seq_len - 1 - places
    channels = first + tl.arange(0, WIDTH)
    inside = (places < seq_len)[:, None] & (channels < DH)[None, :]
    return tl.load(ptr + tokens[:, None] * (heads * DH) + channels[None, :], mask=inside, other=0.0)


@triton.jit
def _store_vectors(
    ptr, values, places, first, seq_len, heads, DH: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr
):
    tokens = places
    if REVERSE:
        tokens = seq_len - 1 - places
    channels = first + tl.arange(0, WIDTH)
    inside = (places < seq_len)[:, None] & (channels < DH)[None, :]
    tl.store(ptr + tokens[:, None] * (heads * DH) + channels[None, :], values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _inner(
    x,
    y,
    rows,
    columns,
    seq_len,
    heads,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inner products (R, T) of the vectors of rows and columns."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, DH, WIDTH):
        x_tile = _vectors(x, rows, first, seq_len, heads, DH, WIDTH, REVERSE)
        y_tile = _vectors(y, columns, first, seq_len, heads, DH, WIDTH, REVERSE)
        total += _dot(x_tile, tl.trans(y_tile), PRECISION)
    return total


@triton.jit
def _decay(coarse, fine, igate, stab, rows, columns, seq_len):
    """exp(F_t - F_s + a_s - stab_t), (R, T), and 0 where the scan has not been yet.

    F is a sum over the whole scan, of which differences of neighbours matter: it comes in two parts, and differences of
    the parts lose nothing.
    """
    row, column = rows < seq_len, columns < seq_len
    coarse_t, fine_t = tl.load(coarse + rows, row, 0.0), tl.load(fine + rows, row, 0.0)
    coarse_s, fine_s = tl.load(coarse + columns, column, 0.0), tl.load(fine + columns, column, 0.0)
    log_decay = (coarse_t[:, None] - coarse_s[None, :]) + (fine_t[:, None] - fine_s[None, :])
    log_decay += tl.load(igate + columns, column, 0.0)[None, :] - tl.load(stab + rows, row, 0.0)[:, None]
    seen = (rows[:, None] >= columns[None, :]) & row[:, None] & column[None, :]
    return tl.exp(tl.where(seen, log_decay, float("-inf")))


@triton.jit
def _matrix(ptr, first_k, first_v, DH: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr):
    """A tile of a state (DH, DH)."""
    k, v = first_k + tl.arange(0, K_WIDTH), first_v + tl.arange(0, V_WIDTH)
    return tl.load(ptr + k[:, None] * DH + v[None, :], mask=(k < DH)[:, None] & (v < DH)[None, :], other=0.0)


@triton.jit
def gates_kernel(
    decay_sum,  # (BH, S), float64: F
    igate,
    row_max,  # (BH, S), float64: max over s of F_t - F_s + a_s
    coarse,  # results (BH, S), float32: F in two parts
    fine,
    stab,  # max(row_max, 0)
    floor,  # exp(-stab)
    eps,  # eps_value * exp(row_max - stab)
    read,  # weight with which a token reads the state that enters its chunk
    write,  # weight with which it is written to the one that leaves, with the scale of its key
    eps_value,
    scale,
    seq_len,
    num_states,
    chunk_size,
    BLOCK: tl.constexpr,
):
    """What the gates amount to. A state is scaled by exp(-stab) of the last token it has seen; all exponents are at most 0."""
    head = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < seq_len
    decay_sum, row_max, numbers = decay_sum + head * seq_len, row_max + head * seq_len, head * seq_len + places
    total = tl.load(decay_sum + places, inside, 0.0)
    largest = tl.load(row_max + places, inside, 0.0)
    stabiliser = tl.maximum(largest, 0.0)
    # Exponentials in float32: many GPUs have next to no units for float64.
    rounded = total.to(tl.float32)
    tl.store(coarse + numbers, rounded, inside)
    tl.store(fine + numbers, (total - rounded.to(tl.float64)).to(tl.float32), inside)
    tl.store(stab + numbers, stabiliser.to(tl.float32), inside)
    tl.store(floor + numbers, tl.exp(-stabiliser.to(tl.float32)), inside)
    tl.store(eps + numbers, eps_value * tl.exp((largest - stabiliser).to(tl.float32)), inside)
    if num_states > 0:
        chunk = places // chunk_size
        enters, leaves = inside & (chunk > 0), inside & (chunk < num_states)
        last = chunk * chunk_size - 1  # token of the chunk before
        entering = tl.load(decay_sum + last, enters, 0.0) - tl.maximum(tl.load(row_max + last, enters, 0.0), 0.0)
        exponent = (total - stabiliser - entering).to(tl.float32)
        tl.store(read + numbers, tl.exp(tl.where(enters, exponent, float("-inf"))), inside)
        last += chunk_size
        leaving = tl.load(decay_sum + last, leaves, 0.0) - tl.maximum(tl.load(row_max + last, leaves, 0.0), 0.0)
        gate = tl.load(igate + numbers, inside, 0.0).to(tl.float64)
        exponent = (leaving - total + gate).to(tl.float32)
        tl.store(write + numbers, scale * tl.exp(tl.where(leaves, exponent, float("-inf"))), inside)


@triton.jit
def denominator_grad_kernel(
    hidden,
    hidden_grad,
    read_sum,
    floor,
    eps,
    read,
    inverse,  # results (BH, S): 1 / denominator
    sum_grad,  # gradient of the sum of a row of weights
    row_max_grad,  # in float64
    state_read,  # weight with which the gradient of what a token reads is written to that of the state
    state_sum,  # what takes the place of a value's 1 in the gradient of the normaliser
    seq_len,
    heads,
    num_states,
    DH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What the denominator max(|n|, floor) + eps passes on, a number a token."""
    head = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < seq_len
    start = (head // heads) * seq_len * heads * DH + (head % heads) * DH
    hidden, hidden_grad, numbers = hidden + start, hidden_grad + start, head * seq_len + places
    product = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, DH, WIDTH):
        grads = _vectors(hidden_grad, places, first, seq_len, heads, DH, WIDTH, REVERSE).to(tl.float32)
        outputs = _vectors(hidden, places, first, seq_len, heads, DH, WIDTH, REVERSE).to(tl.float32)
        product += tl.sum(grads * outputs, axis=1)
    total, floor_t = tl.load(read_sum + numbers, inside, 0.0), tl.load(floor + numbers, inside, 1.0)
    eps_t = tl.load(eps + numbers, inside, 0.0)
    inverse_t = 1.0 / (tl.maximum(tl.abs(total), floor_t) + eps_t)
    grad = -product * inverse_t
    signed = tl.where(total < 0, -grad, grad)
    sum_grad_t = tl.where(tl.abs(total) > floor_t, signed, 0.0)
    tl.store(inverse + numbers, inverse_t, inside)
    tl.store(sum_grad + numbers, sum_grad_t, inside)
    tl.store(row_max_grad + numbers, (grad * eps_t).to(tl.float64), inside)
    if num_states > 0:
        tl.store(state_read + numbers, tl.load(read + numbers, inside, 0.0) * inverse_t, inside)
        tl.store(state_sum + numbers, sum_grad_t / inverse_t, inside)


@triton.jit
def states_kernel(
    key,
    value,
    weight,  # (BH, S): with which a token is written to the next state
    value_sum,  # (BH, S): what takes the place of the value 1 in the normaliser, if BACKWARD
    decay_sum,  # as in `gates_kernel`
    row_max,
    memory,  # (BH, N, DH, DH): results
    norm,  # (BH, N, DH)
    seq_len,
    heads,
    num_states,
    chunk_size,
    DH: tl.constexpr,
    BLOCK: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    """States between chunks: what each chunk adds, summed up along the scan.

    Forward, state n enters chunk n + 1 and gathers the chunks 0 to n. Backward, it is a gradient that gathers the chunks n + 1
    to N in the opposite order; the "keys" are queries, the "values" gradients of the output.
    """
    head = tl.program_id(0).to(tl.int64)
    first_k, first_v = tl.program_id(1) * K_WIDTH, tl.program_id(2) * V_WIDTH
    start = (head // heads) * seq_len * heads * DH + (head % heads) * DH
    key, value = key + start, value + start
    weight, value_sum = weight + head * seq_len, value_sum + head * seq_len
    decay_sum, row_max = decay_sum + head * seq_len, row_max + head * seq_len
    k, v = first_k + tl.arange(0, K_WIDTH), first_v + tl.arange(0, V_WIDTH)
    state = tl.zeros((K_WIDTH, V_WIDTH), tl.float32)
    norm_state = tl.zeros((K_WIDTH,), tl.float32)
    for step in range(num_states):
        number = step
        chunk = step
        if BACKWARD:
            number = num_states - 1 - step
            chunk = number + 1
        # What is left of the state from the last token of one chunk to that of the next; the first state is 0.
        earlier = chunk * chunk_size - 1
        later = earlier + chunk_size
        kept = tl.load(decay_sum + later, step > 0, 0.0) - tl.load(decay_sum + earlier, step > 0, 0.0)
        kept -= tl.maximum(tl.load(row_max + later, step > 0, 0.0), 0.0)
        kept += tl.maximum(tl.load(row_max + earlier, step > 0, 0.0), 0.0)
        factor = tl.exp(kept.to(tl.float32))
        state *= factor
        norm_state *= factor
        for block in range(0, chunk_size, BLOCK):
            places = chunk * chunk_size + block + tl.arange(0, BLOCK)
            inside = places < seq_len
            keys = _vectors(key, places, first_k, seq_len, heads, DH, K_WIDTH, REVERSE)
            values = _vectors(value, places, first_v, seq_len, heads, DH, V_WIDTH, REVERSE)
            weighted = keys.to(tl.float32) * tl.load(weight + places, inside, 0.0)[:, None]
            state += _dot(tl.trans(weighted), values.to(tl.float32), STATE_PRECISION)
            if BACKWARD:
                weighted *= tl.load(value_sum + places, inside, 0.0)[:, None]
            norm_state += tl.sum(weighted, axis=0)
        place = head * num_states + number
        tl.store(
            memory + place * DH * DH + k[:, None] * DH + v[None, :], state, mask=(k < DH)[:, None] & (v < DH)[None, :]
        )
        if first_v == 0:
            tl.store(norm + place * DH + k, norm_state, mask=k < DH)


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    coarse,
    fine,
    igate,
    stab,
    floor,
    eps,
    read,
    memory,
    norm,
    hidden,  # result
    read_sum,  # (BH, S): result, the sum of a row of weights
    scale,
    seq_len,
    heads,
    num_states,
    chunk_size,
    DH: tl.constexpr,
    BLOCK: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    """A block of tokens reads its chunk up to itself, and the state that enters the chunk."""
    head = tl.program_id(0).to(tl.int64)
    first_row, first_v = tl.program_id(1) * BLOCK, tl.program_id(2) * V_WIDTH
    start = (head // heads) * seq_len * heads * DH + (head % heads) * DH
    query, key, value, hidden = query + start, key + start, value + start, hidden + start
    numbers = head * seq_len
    coarse, fine, igate, stab = coarse + numbers, fine + numbers, igate + numbers, stab + numbers
    rows = first_row + tl.arange(0, BLOCK)
    inside = rows < seq_len
    chunk = first_row // chunk_size

    numerator = tl.zeros((BLOCK, V_WIDTH), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first_column in range(chunk * chunk_size, first_row + BLOCK, BLOCK):
        columns = first_column + tl.arange(0, BLOCK)
        scores = _inner(query, key, rows, columns, seq_len, heads, DH, K_WIDTH, REVERSE, PRECISION) * scale
        scores *= _decay(coarse, fine, igate, stab, rows, columns, seq_len)
        values = _vectors(value, columns, first_v, seq_len, heads, DH, V_WIDTH, REVERSE)
        numerator += _dot(scores.to(values.dtype), values, PRECISION)
        total += tl.sum(scores, axis=1)
    if chunk > 0:
        weight = tl.load(read + numbers + rows, inside, 0.0)
        place = head * num_states + chunk - 1
        for first_k in range(0, DH, K_WIDTH):
            queries = _vectors(query, rows, first_k, seq_len, heads, DH, K_WIDTH, REVERSE)
            state = _matrix(memory + place * DH * DH, first_k, first_v, DH, K_WIDTH, V_WIDTH)
            numerator += weight[:, None] * _dot(queries.to(tl.float32), state, STATE_PRECISION)
            k = first_k + tl.arange(0, K_WIDTH)
            norm_state = tl.load(norm + place * DH + k, mask=k < DH, other=0.0)
            total += weight * tl.sum(queries.to(tl.float32) * norm_state[None, :], axis=1)
    floor_t, eps_t = tl.load(floor + numbers + rows, inside, 1.0), tl.load(eps + numbers + rows, inside, 0.0)
    result = numerator / (tl.maximum(tl.abs(total), floor_t) + eps_t)[:, None]
    _store_vectors(hidden, result, rows, first_v, seq_len, heads, DH, V_WIDTH, REVERSE)
    if first_v == 0:
        tl.store(read_sum + numbers + rows, total, mask=inside)


@triton.jit
def query_grad_kernel(
    query,
    key,
    value,
    hidden_grad,
    coarse,
    fine,
    igate,
    stab,
    inverse,
    sum_grad,
    read,
    memory,
    norm,
    query_grad,  # results
    log_grad,  # (BH, tiles, S): gradient of the logarithms of a row of weights, a part for each tile of channels
    scale,
    seq_len,
    heads,
    num_states,
    chunk_size,
    DH: tl.constexpr,
    BLOCK: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    first_row, first_k = tl.program_id(1) * BLOCK, tl.program_id(2) * K_WIDTH
    start = (head // heads) * seq_len * heads * DH + (head % heads) * DH
    query, key, value = query + start, key + start, value + start
    hidden_grad, query_grad = hidden_grad + start, query_grad + start
    numbers = head * seq_len
    coarse, fine, igate, stab = coarse + numbers, fine + numbers, igate + numbers, stab + numbers
    rows = first_row + tl.arange(0, BLOCK)
    inside = rows < seq_len
    inverse_t = tl.load(inverse + numbers + rows, inside, 0.0)[:, None]
    sum_grad_t = tl.load(sum_grad + numbers + rows, inside, 0.0)[:, None]
    chunk = first_row // chunk_size

    grad = tl.zeros((BLOCK, K_WIDTH), tl.float32)
    through_state = tl.zeros((BLOCK, K_WIDTH), tl.float32)
    logs = tl.zeros((BLOCK,), tl.float32)
    for first_column in range(chunk * chunk_size, first_row + BLOCK, BLOCK):
        columns = first_column + tl.arange(0, BLOCK)
        weight_grad = _inner(hidden_grad, value, rows, columns, seq_len, heads, DH, V_WIDTH, REVERSE, PRECISION)
        weight_grad = weight_grad * inverse_t + sum_grad_t
        weight_grad *= scale * _decay(coarse, fine, igate, stab, rows, columns, seq_len)
        if first_k == 0:
            products = _inner(query, key, rows, columns, seq_len, heads, DH, V_WIDTH, REVERSE, PRECISION)
            logs += tl.sum(weight_grad * products, axis=1)
        keys = _vectors(key, columns, first_k, seq_len, heads, DH, K_WIDTH, REVERSE)
        grad += _dot(weight_grad.to(keys.dtype), keys, PRECISION)
    if chunk > 0:
        weight = tl.load(read + numbers + rows, inside, 0.0)[:, None]
        place = head * num_states + chunk - 1
        for first_v in range(0, DH, V_WIDTH):
            grads = _vectors(hidden_grad, rows, first_v, seq_len, heads, DH, V_WIDTH, REVERSE)
            state = _matrix(memory + place * DH * DH, first_k, first_v, DH, K_WIDTH, V_WIDTH)
            product = _dot(grads.to(tl.float32), tl.trans(state), STATE_PRECISION)
            through_state += weight * inverse_t * product
        k = first_k + tl.arange(0, K_WIDTH)
        through_state += weight * sum_grad_t * tl.load(norm + place * DH + k, mask=k < DH, other=0.0)[None, :]
    own_queries = _vectors(query, rows, first_k, seq_len, heads, DH, K_WIDTH, REVERSE).to(tl.float32)
    part = (head * tl.num_programs(2) + tl.program_id(2)) * seq_len
    tl.store(log_grad + part + rows, logs + tl.sum(own_queries * through_state, axis=1), mask=inside)
    _store_vectors(query_grad, grad + through_state, rows, first_k, seq_len, heads, DH, K_WIDTH, REVERSE)


@triton.jit
def key_value_grad_kernel(
    query,
    key,
    value,
    hidden_grad,
    coarse,
    fine,
    igate,
    stab,
    inverse,
    sum_grad,
    write,
    memory_grad,
    norm_grad,
    key_grad,  # results
    value_grad,
    log_grad,  # (BH, tiles, S): gradient of the logarithms of a column of weights, a part for each tile of channels
    scale,
    seq_len,
    heads,
    num_states,
    chunk_size,
    DH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    first_column, first = tl.program_id(1) * BLOCK, tl.program_id(2) * WIDTH
    start = (head // heads) * seq_len * heads * DH + (head % heads) * DH
    query, key, value, hidden_grad = query + start, key + start, value + start, hidden_grad + start
    key_grad, value_grad = key_grad + start, value_grad + start
    numbers = head * seq_len
    coarse, fine, igate, stab = coarse + numbers, fine + numbers, igate + numbers, stab + numbers
    columns = first_column + tl.arange(0, BLOCK)
    chunk = first_column // chunk_size

    k_grad = tl.zeros((BLOCK, WIDTH), tl.float32)
    v_grad = tl.zeros((BLOCK, WIDTH), tl.float32)
    through_state = tl.zeros((BLOCK, WIDTH), tl.float32)
    logs = tl.zeros((BLOCK,), tl.float32)
    for first_row in range(first_column, tl.minimum((chunk + 1) * chunk_size, seq_len), BLOCK):
        rows = first_row + tl.arange(0, BLOCK)
        inside = rows < seq_len
        inverse_t = tl.load(inverse + numbers + rows, inside, 0.0)[:, None]
        sum_grad_t = tl.load(sum_grad + numbers + rows, inside, 0.0)[:, None]
        decay = scale * _decay(coarse, fine, igate, stab, rows, columns, seq_len)
        products = _inner(query, key, rows, columns, seq_len, heads, DH, WIDTH, REVERSE, PRECISION)
        weights = products * decay * inverse_t
        weight_grad = _inner(hidden_grad, value, rows, columns, seq_len, heads, DH, WIDTH, REVERSE, PRECISION)
        weight_grad = (weight_grad * inverse_t + sum_grad_t) * decay
        if first == 0:
            logs += tl.sum(weight_grad * products, axis=0)
        grads = _vectors(hidden_grad, rows, first, seq_len, heads, DH, WIDTH, REVERSE)
        queries = _vectors(query, rows, first, seq_len, heads, DH, WIDTH, REVERSE)
        v_grad += _dot(tl.trans(weights.to(grads.dtype)), grads, PRECISION)
        k_grad += _dot(tl.trans(weight_grad.to(queries.dtype)), queries, PRECISION)
    if chunk < num_states:
        written = tl.load(write + numbers + columns, columns < seq_len, 0.0)[:, None]
        place = head * num_states + chunk
        for other in range(0, DH, WIDTH):
            values = _vectors(value, columns, other, seq_len, heads, DH, WIDTH, REVERSE)
            keys = _vectors(key, columns, other, seq_len, heads, DH, WIDTH, REVERSE)
            for_keys = _matrix(memory_grad + place * DH * DH, first, other, DH, WIDTH, WIDTH)
            for_values = _matrix(memory_grad + place * DH * DH, other, first, DH, WIDTH, WIDTH)
            through_state += written * _dot(values.to(tl.float32), tl.trans(for_keys), STATE_PRECISION)
            v_grad += written * _dot(keys.to(tl.float32), for_values, STATE_PRECISION)
        k = first + tl.arange(0, WIDTH)
        through_state += written * tl.load(norm_grad + place * DH + k, mask=k < DH, other=0.0)[None, :]
    own_keys = _vectors(key, columns, first, seq_len, heads, DH, WIDTH, REVERSE).to(tl.float32)
    part = (head * tl.num_programs(2) + tl.program_id(2)) * seq_len
    tl.store(log_grad + part + columns, logs + tl.sum(own_keys * through_state, axis=1), mask=columns < seq_len)
    _store_vectors(key_grad, k_grad + through_state, columns, first, seq_len, heads, DH, WIDTH, REVERSE)
    _store_vectors(value_grad, v_grad, columns, first, seq_len, heads, DH, WIDTH, REVERSE)
