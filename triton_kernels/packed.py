"""Device functions on the packed format: indices of 16 x 32 blocks to codes, and codes to weights.

Seen as 32-bit words, a row of tiles is idx [units][WORDS][16 rows]: a unit is V consecutive vectors, whose codes one row keeps in
one word (code bits 2, 4, 8) or in the words of three planes (3, 6, 12).  Byte j of a word holds vectors j, 4 + j, ...  See bit_map in
gptvq/backends/reference_packed.py.  Codebooks come as one little-endian integer of DIM int8 per centroid, [groups, K].  Of the 12 bits of
a code with signs, 8 are the number of a centroid; the signs are the third word, where byte i has those of dimension i, bit v of vector v.
"""
import triton
import triton.language as tl


@triton.jit
def codebook_of(cb, group, BITS: tl.constexpr):
    return cb + (group << (8 if BITS == 12 else BITS))


@triton.jit
def negated(packed, signs):
    """Centroids of four values 1 to 127, each negative where the lowest bit of its byte of `signs` is set: all four at a time."""
    minus = signs & 0x01010101
    return (packed ^ minus * 255) + minus               # -e is ~e + 1, and no byte carries since none of them is 0


@triton.jit
def unit_code(words, v: tl.constexpr, BITS: tl.constexpr):
    """Code of vector v of a unit without signs, from the tuple of its words."""
    if BITS == 12:
        code = words[v // 4] >> 8 * (v % 4) & 255
    elif BITS == 6:
        if v < 12:
            code = words[v // 4] >> 8 * (v % 4) & 63
        else:                                           # in the top bits of the three planes, high bits first
            code = (words[0] >> 8 * (v % 4) + 6 & 3) << 4 | (words[1] >> 8 * (v % 4) + 6 & 3) << 2 | words[2] >> 8 * (v % 4) + 6 & 3
    elif BITS == 3:
        if v < 24:
            code = words[v // 8] >> 8 * (v % 4) + 3 * (v // 4 % 2) & 7
        else:
            code = words[v // 4 - 6] >> 8 * (v % 4) + 6 & 3 | (words[2] >> 8 * (v % 4) + v // 4 & 1) << 2
    else:
        code = words[0] >> 8 * (v % 4) + BITS * (v // 4) & (1 << BITS) - 1
    return code


@triton.jit
def component(packed, i: tl.constexpr, DIM: tl.constexpr):
    """Value i of centroids that come as integers of 8 * DIM bits, as float32."""
    return (packed >> 8 * i).to(tl.int8).to(tl.float32)


@triton.jit
def codes_of(idx, row, n, inside, units, BITS: tl.constexpr, V: tl.constexpr, WORDS: tl.constexpr):
    """Codes [R, N] without signs of vectors n [1, N] in rows [R, 1]; anything where not `inside`."""
    word = idx + ((row // 16) * units + n // V) * (16 * WORDS) + row % 16
    shift, quad = 8 * (n % 4), n % V // 4
    if BITS == 12:
        code = tl.load(word + 16 * quad, mask=inside, other=0) >> shift & 255
    elif BITS == 6:
        low = tl.load(word + 16 * (quad % 3), mask=inside, other=0) >> shift & 63
        last = quad == 3
        high = tl.load(word, mask=inside & last, other=0) >> shift + 6 & 3
        middle = tl.load(word + 16, mask=inside & last, other=0) >> shift + 6 & 3
        code = tl.where(last, high << 4 | middle << 2 | tl.load(word + 32, mask=inside & last, other=0) >> shift + 6 & 3, low)
    elif BITS == 3:
        low = tl.load(word + 16 * (quad // 2 % 3), mask=inside, other=0) >> shift + 3 * (quad % 2) & 7
        last = quad >= 6
        two = tl.load(word + 16 * (quad % 2), mask=inside & last, other=0) >> shift + 6 & 3
        code = tl.where(last, two | (tl.load(word + 32, mask=inside & last, other=0) >> shift + 6 + quad % 2 & 1) << 2, low)
    else:
        code = tl.load(word, mask=inside, other=0) >> shift + BITS * quad & (1 << BITS) - 1
    return code


@triton.jit
def signs_of(idx, row, n, inside, units, V: tl.constexpr, WORDS: tl.constexpr):
    """Signs that `negated` takes, where and as codes_of."""
    word = idx + ((row // 16) * units + n // V) * (16 * WORDS) + 32 + row % 16
    return tl.load(word, mask=inside, other=0) >> n % V


@triton.jit
def block_scale(sc, table, row, block, pairs):
    """Scale of a row's scale block, both tensors of one shape or broadcast to it; block must be one of the weight's."""
    byte = tl.load(sc + ((row // 16) * pairs + block // 2) * 16 + row % 16).to(tl.int32)
    return tl.load(table + block * 16 + (byte >> block % 2 * 4 & 15))


@triton.jit
def weight_tile(idx, cb, gs, sc, table, row, n, rows, cols, units, strips, pairs, BITS: tl.constexpr, DIM: tl.constexpr,
                V: tl.constexpr, WORDS: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_COLS: tl.constexpr, SCALE_BLOCK: tl.constexpr,
                R: tl.constexpr, N: tl.constexpr):
    """W [R, N * DIM] in float32: vectors n [1, N] of rows [R, 1], columns in natural order; anything outside the weight.

    Codebook entry times codebook scale times block scale, in this order: bit for bit what dequantization means.
    """
    inside = (row < rows) & (n * DIM < cols)
    code = codes_of(idx, row, n, inside, units, BITS, V, WORDS)
    if BITS == 12:
        signs = signs_of(idx, row, n, inside, units, V, WORDS)
    row, col = tl.minimum(row, rows - 1), tl.minimum(n * DIM, cols - 1)
    group = row // GROUP_ROWS * strips + col // GROUP_COLS
    packed, size = tl.load(codebook_of(cb, group, BITS) + code), tl.load(gs + group)
    if BITS == 12:
        packed = negated(packed, signs)
    if SCALE_BLOCK > 0:
        scale = block_scale(sc, table, row, col // SCALE_BLOCK, pairs)
    parts = ()
    for i in tl.static_range(DIM):
        value = component(packed, i, DIM) * size
        if SCALE_BLOCK > 0:
            value = value * scale
        parts = parts + (value,)
    if DIM == 1:
        tile = parts[0]
    elif DIM == 2:
        tile = tl.join(parts[0], parts[1])
    else:
        tile = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    return tl.reshape(tile, (R, N * DIM))
