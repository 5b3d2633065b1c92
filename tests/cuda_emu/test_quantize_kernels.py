"""The CUDA kernels of blocks of columns against the reference and checks in float64; several orders of threads give equal bits."""
from dataclasses import dataclass

import pytest
import torch
from cases import DEGENERATE, GENERIC, Case, ids
from quantize_cases import check_column_block, check_descent_block, in_orders, inputs, rows_alike, to

from gptvq import ops
from gptvq.backends import cuda_call, cuda_quantize, reference
from gptvq.errors import ConfigError


@dataclass(frozen=True)
class Block:
    """A block of random columns: several strips in mixed order, several row groups in one tile or one over several tiles."""

    rows: int
    n: int
    d: int
    k: int
    group_rows: int
    strips: int = 1
    scaled: bool = False
    signed: bool = False

    def build(self):
        """W or R, U, roots, H, centroids, strip, scale."""
        g = torch.Generator().manual_seed(self.rows * self.n + self.k)
        cols, groups = self.n * self.d, -(-self.rows // self.group_rows)
        x = torch.randn(2 * cols + 8, cols, generator=g, dtype=torch.float64)
        H = x.T @ x / len(x) + 0.05 * torch.eye(cols, dtype=torch.float64)
        U = torch.linalg.cholesky(torch.linalg.inv(H)).T
        roots = torch.stack([torch.linalg.inv(U[p:p + self.d, p:p + self.d]) for p in range(0, cols, self.d)])
        centroids = torch.randn(groups, self.strips, self.k, self.d, generator=g)
        centroids = centroids.abs() + 0.01 if self.signed else centroids
        half = self.k // 2
        centroids[:, :, half:] = centroids[:, :, half:].index_select(2, torch.arange(self.k - half) // 2)    # equals side by side
        centroids[:, :, -1] = centroids[:, :, 0]                                                             # and far apart
        strip = torch.randint(self.strips, (self.n,), generator=g)
        scale = torch.rand(self.rows, self.n, generator=g) + 0.25 if self.scaled else None
        return torch.randn(self.rows, cols, generator=g), U.float(), roots.float(), H.float(), centroids, strip, scale


BLOCKS = [
    Block(70, 5, 2, 16, 24, 3), Block(33, 17, 1, 4, 1, 2, True), Block(40, 9, 4, 256, 64), Block(5, 8, 4, 200, 1, 2, True),
    Block(35, 3, 2, 11, 3), Block(9, 64, 2, 64, 9, 4), Block(3, 128, 1, 16, 2, 5), Block(2, 32, 4, 3, 1), Block(64, 2, 2, 256, 32, 1, True),
    Block(1, 1, 1, 1, 1), Block(37, 4, 1, 16, 37), Block(40, 9, 4, 256, 64, 1, False, True), Block(5, 8, 4, 256, 1, 2, True, True),
    Block(37, 3, 4, 256, 24, 2, False, True),
]
#: codes with signs; the reference's of other formats are GENERIC
SIGNED = [Case("4d +-K256", 24, 52, 4, 3, 64, 64), Case("4d +-K256 scales", 24, 64, 4, 3, 24, 64, 32)]


def codes_before(block):
    """Any, of the block's kind."""
    g, most = torch.Generator().manual_seed(1), 4096 if block.signed else block.k
    return torch.randint(most, (block.rows, block.n), dtype=torch.int16 if block.signed else torch.uint8, generator=g)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_column_block_takes_the_first_of_the_nearest(machine, block):
    W, U, roots, _, *rest = block.build()
    args = to(machine, W, U, roots, *rest, block.group_rows)
    index, E = in_orders(machine, lambda: ops.column_block(*args, False, block.signed))
    assert index.dtype == codes_before(block).dtype
    check_column_block(index, E, W, U, roots, *rest, block.group_rows)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_coordinate_descent_takes_the_first_of_the_nearest(machine, block):
    R, _, _, H, centroids, strip, scale = block.build()
    before = codes_before(block)
    args = to(machine, R, H, before, centroids, strip, scale, block.group_rows)
    index, change = in_orders(machine, lambda: ops.descent_block(*args))
    assert torch.equal(args[2].cpu(), before)
    check_descent_block(index, change, before, R, H, centroids, strip, scale, block.group_rows)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("case", GENERIC + DEGENERATE + SIGNED, ids=ids)
def test_column_block_equals_the_reference(machine, case, stale):
    problem, U, roots, _, _, centroids = inputs(case)
    args = problem.W, U, roots, centroids, problem.strip, problem.scale, case.group_rows, stale
    signed = case.spec.signs > 0
    index, E = in_orders(machine, lambda: ops.column_block(*to(machine, *args), signed), ("forward",))
    want_index, want_E = reference.column_block(*args, signed)
    if case not in DEGENERATE:
        same = rows_alike(index, want_index)
        torch.testing.assert_close(E[same], want_E[same], rtol=1e-3, atol=1e-4 * float(want_E.abs().max()))
        check_column_block(index, E, *args)
    assert int(index.max()) < 1 << case.spec.code_bits
    assert float(E.square().sum()) == pytest.approx(float(want_E.square().sum()), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("case", GENERIC + DEGENERATE + SIGNED, ids=ids)
def test_descent_block_equals_the_reference(machine, case):
    problem, _, _, _, index, centroids = inputs(case)
    H = problem.H + 1e-3 * torch.eye(len(problem.H))
    q = reference.decode(index, centroids, problem.strip, problem.scale, case.group_rows)
    args = (problem.W - q) @ H, H, index, centroids, problem.strip, problem.scale, case.group_rows
    got, change = in_orders(machine, lambda: ops.descent_block(*to(machine, *args)), ("reverse",))
    want, want_change = reference.descent_block(*args)
    if case not in DEGENERATE:
        same = rows_alike(got, want)
        torch.testing.assert_close(change[same], want_change[same], rtol=1e-4, atol=1e-5 * float(want_change.abs().max()) + 1e-8)
    before, after = (float((((problem.W - Q).double() @ H.double()) * (problem.W - Q)).sum()) for Q in (q, q + change))
    assert after <= before * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("d, scaled, signed", [(1, True, False), (2, False, False), (4, True, False), (4, True, True)])
def test_views_and_blocks_wider_than_one_launch(machine, d, scaled, signed):
    """Rows apart, vectors that begin anywhere, and 152 columns: two launches and a product between them."""
    block = Block(6, 152 // d, d, 256 if signed else 16, 4, 3, scaled, signed)
    W, U, roots, H, centroids, strip, scale = block.build()
    odd = torch.empty(centroids.numel() + 1)[1:].view(centroids.shape).copy_(centroids)
    wide = [torch.nn.functional.pad(t, (3, 5)) for t in (W, U, H)] + [None if scale is None else torch.nn.functional.pad(scale, (1, 2))]
    W_, U_, H_ = (t[:, 3:-5] for t in to(machine, *wide[:3]))
    scale_ = None if scale is None else to(machine, wide[3])[0][:, 1:-2]
    rest = to(machine, odd, strip)
    for stale in (False, True):
        args = W_, U_, roots.to(machine.device), *rest, scale_, 4, stale, signed
        index, E = in_orders(machine, lambda: ops.column_block(*args), ("forward",))
        check_column_block(index, E, W, U, roots, centroids, strip, scale, 4, stale)
    before = torch.zeros(6, 152 // d, dtype=codes_before(block).dtype)
    index, change = in_orders(machine, lambda: ops.descent_block(W_, H_, before.to(machine.device), *rest, scale_, 4), ("forward",))
    check_descent_block(index, change, before, W, H, centroids, strip, scale, 4)


def test_numbers_that_only_the_device_sees_are_never_addresses(machine):
    """Strips and codes out of range stand for the nearest in range; a row that is not finite harms no other."""
    W, U, roots, H, centroids, _, _ = Block(6, 4, 2, 16, 2, 3).build()
    strips = torch.tensor([-1, 3, 1 << 40, -(1 << 62)]), torch.tensor([0, 2, 2, 0])
    got, want = (in_orders(machine, lambda: ops.column_block(*to(machine, W, U, roots, centroids, s, None, 2))) for s in strips)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    codes = torch.full((6, 4), 255, dtype=torch.uint8)
    got, want = (in_orders(machine, lambda: ops.descent_block(*to(machine, W, H, c, centroids, strips[1], None, 2)))
                 for c in (codes, codes.clamp_max(15)))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    _, _, _, H4, books, strip, _ = Block(6, 4, 4, 256, 2, 1, signed=True).build()
    R, codes = torch.randn(6, 16), torch.randint(-2**15, 2**15, (6, 4), dtype=torch.int16)
    got, want = (in_orders(machine, lambda: ops.descent_block(*to(machine, R, H4, c, books, strip, None, 2)), ("reverse",))
                 for c in (codes, codes & 0xfff))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    W[0], W[1] = torch.nan, torch.inf
    args = to(machine, W, U, roots, centroids, strips[1], None, 2)
    index, E = in_orders(machine, lambda: [t.nan_to_num() for t in ops.column_block(*args)])
    check_column_block(index[2:], E[2:], W[2:], U, roots, centroids[1:], strips[1], None, 2)
    assert int(index.max()) < 16


@pytest.mark.parametrize("signed", [False, True])
def test_three_tiles_share_the_memory_of_a_multiprocessor(machine, signed):
    shared = int(cuda_call.kernels.column_plan(1000, 32, 4, 21, 3, 256, 48, signed)["text"].split()[-3])
    assert 3 * (shared + 1024) <= 227 * 1024


@pytest.mark.parametrize("d, k, group_rows, tile, groups", [(2, 16, 4, 32, 8), (1, 16, 1, 32, 32), (4, 256, 256, 32, 1),
                                                            (4, 256, 48, 32, 2), (2, 256, 1, 2, 2), (2, 64, 7, 32, 6), (2, 128, 3, 8, 4)])
def test_a_tile_is_as_tall_as_its_codebooks_allow(machine, d, k, group_rows, tile, groups):
    plan = cuda_call.kernels.column_plan(1000, 128 // d, d, -(-1000 // group_rows), 3, k, group_rows)
    assert (plan["tile"], plan["tile_groups"]) == (tile, groups) and f"tile {tile} rows" in plan["text"]


def test_malformed_arguments_are_refused(machine):
    block = Block(6, 4, 2, 16, 2, 3)
    W, U, roots, H, centroids, strip, _ = to(machine, *block.build())
    index = torch.zeros(6, 4, dtype=torch.uint8, device=machine.device)
    for change, message in (({0: W[:, :-2]}, "W: got"), ({1: U.double().float()[1:]}, "U: got"), ({2: roots[1:]}, "roots: got"),
                            ({3: centroids[:2]}, "cover the rows"), ({3: centroids.repeat(1, 1, 17, 1)}, "centroids: got"),
                            ({4: strip.int()}, "strip: got"), ({5: W}, "scale: got"), ({6: 0}, "group_rows"),
                            ({4: strip[1:]}, "W: got")):
        with pytest.raises(ConfigError, match=f"column_block: .*{message}"):
            cuda_quantize.column_block(*[change.get(i, a) for i, a in enumerate((W, U, roots, centroids, strip, None, 2))])
    for change, message in (({0: W[:-1]}, "R: got"), ({1: H[:, 1:]}, "H: got"), ({3: centroids[..., :1]}, "R: got")):
        with pytest.raises(ConfigError, match=f"descent_block: .*{message}"):
            cuda_quantize.descent_block(*[change.get(i, a) for i, a in enumerate((W, H, index, centroids, strip, None, 2))])
    with pytest.raises(ConfigError, match="column_block: centroids: got .*need 256 vectors of 4"):
        cuda_quantize.column_block(W, U, roots, centroids, strip, None, 2, signed=True)
    double = [a.double() if a is not None and a.is_floating_point() else a for a in (W, U, roots, centroids, strip, None)]
    assert cuda_quantize.column_block(*double, 2)[1].dtype == torch.float64        # by the reference
