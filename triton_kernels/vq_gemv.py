"""y = W x + b for up to 8 tokens: every byte of the packed weight is read once, by whole rows of tiles.

A program owns R rows (whole tiles) and walks their units, C at a time.  16 rows x 1 word are 64 consecutive bytes, so that a
thread loads 16 bytes, four rows of a unit, and a warp 512.  Everything that belongs to a unit (codes, codebook look-ups, activations)
stays with the thread that loaded it; only the sum over the units crosses threads, at the end.  That holds where Triton gives the
look-ups, whose addresses say nothing about a layout, the layout of the loads: it takes the last dimension for the fastest, but the
first up to version 3.6.  Hence tiles are [C, R] where ROWS_LAST, else [R, C].
"""
import triton
import triton.language as tl

from .packed import block_scale, codebook_of, component, negated, unit_code


@triton.jit
def _along_rows(values, ROWS_LAST: tl.constexpr):
    return values[None, :] if ROWS_LAST else values[:, None]


@triton.jit
def _along_units(values, ROWS_LAST: tl.constexpr):
    return values[:, None] if ROWS_LAST else values[None, :]


@triton.jit
def _words(idx, row, unit, units, tiles, WORDS: tl.constexpr):
    words = ()
    for w in tl.static_range(WORDS):
        at = idx + ((row // 16) * units + unit) * (16 * WORDS) + 16 * w + row % 16
        words = words + (tl.load(at, mask=(unit < units) & (row // 16 < tiles), other=0),)
    return words


@triton.jit
def vq_gemv_kernel(x, idx, cb, gs, sc, table, bias, y, tokens, rows, cols, units, tiles, strips, pairs, M: tl.constexpr,
                   BITS: tl.constexpr, DIM: tl.constexpr, V: tl.constexpr, WORDS: tl.constexpr, GROUP_ROWS: tl.constexpr,
                   GROUP_COLS: tl.constexpr, SCALE_BLOCK: tl.constexpr, EVEN: tl.constexpr,
                   ROWS_LAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """x [tokens, cols], bias float32 [rows] or None, y [tokens, rows] like x; tokens <= M, sums in float32.

    EVEN: cols are whole steps of C units.  Where a group or a scale block is not made of whole units, its scale is applied vector by
    vector.
    """
    GROUP_OF_UNITS: tl.constexpr = GROUP_COLS % (V * DIM) == 0
    SCALE_OF_UNITS: tl.constexpr = SCALE_BLOCK % (V * DIM) == 0
    row = _along_rows(tl.program_id(0) * R + tl.arange(0, R), ROWS_LAST)
    own = tl.minimum(row, rows - 1)
    codebooks = own // GROUP_ROWS * strips
    sums = ()
    for m in tl.static_range(M):
        sums = sums + (tl.zeros((C, R) if ROWS_LAST else (R, C), tl.float32),)
    words = _words(idx, row, _along_units(tl.arange(0, C), ROWS_LAST), units, tiles, WORDS)
    for first in range(0, units, C):
        unit = _along_units(first + tl.arange(0, C), ROWS_LAST)
        following = _words(idx, row, unit + C, units, tiles, WORDS)         # on their way while these are worked on
        begin = tl.minimum(unit * (V * DIM), cols - 1)
        if GROUP_OF_UNITS:
            group = codebooks + begin // GROUP_COLS
            entries = codebook_of(cb, group, BITS)
            size = tl.load(gs + group)
        else:
            size = 1.0
        if SCALE_BLOCK > 0 and SCALE_OF_UNITS:
            size = size * block_scale(sc, table, own, begin // SCALE_BLOCK, pairs)
        parts = ()
        for m in tl.static_range(M):
            parts = parts + (tl.zeros((C, R) if ROWS_LAST else (R, C), tl.float32),)
        for v in tl.static_range(V):
            col = unit * (V * DIM) + v * DIM
            start = tl.minimum(col, cols - 1)
            if not GROUP_OF_UNITS:
                group = codebooks + start // GROUP_COLS
                entries = codebook_of(cb, group, BITS)
            packed = tl.load(entries + unit_code(words, v, BITS))
            if BITS == 12:
                packed = negated(packed, words[2] >> v)
            for i in tl.static_range(DIM):
                weight = component(packed, i, DIM)
                if not GROUP_OF_UNITS:
                    weight = weight * tl.load(gs + group)
                if SCALE_BLOCK > 0 and not SCALE_OF_UNITS:
                    weight = weight * block_scale(sc, table, own, start // SCALE_BLOCK, pairs)
                new = ()
                for m in tl.static_range(M):
                    at = x + tl.minimum(m, tokens - 1) * cols + col + i
                    value = tl.load(at) if EVEN else tl.load(at, mask=col + i < cols, other=0.0)
                    new = new + (parts[m] + weight * value.to(tl.float32),)
                parts = new
        new = ()
        for m in tl.static_range(M):
            new = new + (sums[m] + parts[m] * size,)
        sums, words = new, following
    row = tl.program_id(0) * R + tl.arange(0, R)
    for m in tl.static_range(M):
        total = tl.sum(sums[m], axis=0 if ROWS_LAST else 1)
        if bias is not None:
            total += tl.load(bias + row, mask=row < rows, other=0.0)
        tl.store(y + m * rows + row, total.to(y.dtype.element_ty), mask=(row < rows) & (m < tokens))
