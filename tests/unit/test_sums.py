"""Sums over samples: one order of additions, written out here, for any number of processes (threads, here)."""
import random
import threading

import pytest
import torch

from gptvq import ranks, sums
from gptvq.hessian import Counts, Hessian, packed_size
from gptvq.ranks import CHUNKS, Samples
from gptvq.sums import Sums, summed

CPU, SIZES = torch.device("cpu"), {"a": 10, "b": 10, "c": 37, "d": 5, "never": 3}


@pytest.fixture
def together(monkeypatch):
    """run(parts, work): work(rank) on as many threads, for which gather and deal exchange tensors -> what each returned."""
    here = threading.local()

    def run(parts, work):
        barrier, box, found = threading.Barrier(parts, timeout=20), [None] * parts, [None] * parts

        def exchanged(x):
            box[here.rank] = x
            barrier.wait()
            seen = list(box)
            barrier.wait()
            return seen

        monkeypatch.setattr(ranks, "size", lambda: parts)
        monkeypatch.setattr(ranks, "rank", lambda: here.rank)
        monkeypatch.setattr(ranks, "gather", exchanged)
        monkeypatch.setattr(ranks, "deal", lambda x, rows: torch.cat([piece[here.rank] for piece in exchanged(x)]))

        def thread(rank):
            here.rank = rank
            found[rank] = work(rank)

        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(parts)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        return found

    return run


def chunks(samples, seed):
    """Sums of chunk 0 to 7 with samples: some linears not called, b sharing a's inputs or not."""
    rng, found = random.Random(seed), {}
    for chunk in range(CHUNKS):
        own = Sums()
        for name in ("a", "b", "c", "d"):
            if rng.random() < 0.75:
                own.put(name, torch.randn(SIZES[name]) * 10 ** rng.randint(-3, 3), Counts(rng.randint(1, 50), rng.randint(0, 2)))
        if "a" in own.leaders and "b" in own.leaders and rng.random() < 0.5:
            own.leaders["b"] = "a"
            del own.flats["b"], own.counts["b"]
        found[chunk] = own
    return {c: found[c] for c in found if len(Samples(samples).of(c))}


def written_out(found, name):
    """(((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), tokens, dropped) of what there is of a linear; None where there is nothing."""
    def of(chunk):
        own = found.get(chunk, Sums())
        return None if name not in own.leaders else own.flats[own.leaders[name]].clone()

    def plus(a, b):
        return b if a is None else a if b is None else a + b

    total = plus(plus(plus(of(0), of(1)), plus(of(2), of(3))), plus(plus(of(4), of(5)), plus(of(6), of(7))))
    counts = [own.counts[own.leaders[name]].read() for own in found.values() if name in own.leaders]
    return total, sum(c[0] for c in counts), sum(c[1] for c in counts)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("samples", [1, 5, 29])
def test_one_order_of_additions(together, monkeypatch, parts, samples):
    monkeypatch.setattr(sums, "_PIECE", 16)                 # not all in one
    for seed in range(5):
        found, calls = chunks(samples, seed), []

        def work(rank, found=found, calls=calls):
            share = Samples(samples, shared=True)

            def chunk(places):
                first = places.start + share.first
                calls.append((first, len(places)))
                return found[share.cuts[1:].index(first + len(places))]
            return summed(share, SIZES, CPU, chunk)

        totals = together(parts, work)
        assert sorted(calls) == sorted((cut, n) for cut, end in zip(Samples(samples).cuts, Samples(samples).cuts[1:]) if (n := end - cut))
        for total in totals:
            for name in SIZES:
                want, tokens, dropped = written_out(found, name)
                assert (name in total.leaders) == (want is not None)
                if want is not None:
                    leader = total.leaders[name]
                    assert torch.equal(total.flats[leader], want) and total.counts[leader].read() == (tokens, dropped)
            same = all(own.leaders.get("a") == own.leaders.get("b") for own in found.values())
            assert (total.leaders.get("a") == total.leaders.get("b")) == same


def test_three_sums_wait_at_most(monkeypatch):
    """Of one process, for a chunk that is worked on."""
    alive, most = set(), []

    class Counted(Sums):
        def __init__(self, *parts):
            super().__init__(*parts)
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    def chunk(places):
        most.append(len(alive))
        own = Counted()
        own.put("a", torch.ones(10), Counts(1))
        return own

    monkeypatch.setattr(sums, "Sums", Counted)
    total = summed(Samples(100), {"a": 10}, CPU, chunk)
    assert torch.equal(total.flats["a"], torch.full((10,), 8.0)) and most == [0, 1, 1, 2, 1, 2, 2, 3]


@pytest.mark.parametrize("cols", [1, 5, 128, 129, 300])
def test_a_packed_hessian(cols):
    hessian = Hessian(cols)
    hessian.add(torch.randn(40, cols))
    flat = hessian.packed()
    assert flat.shape == (packed_size(cols),) and packed_size(cols) <= cols * (cols + 128) / 2
    back = Hessian.from_packed(flat, cols, CPU, hessian.counts)
    assert torch.equal(back.matrix(), hessian.matrix()) and back.tokens == 40


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 128])
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 13])
def test_shares_are_whole_chunks(monkeypatch, samples, parts):
    monkeypatch.setattr(ranks, "size", lambda: parts)
    shares = []
    for rank in range(parts):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(Samples(samples, shared=True))
    assert shares[0].first == 0 < shares[0].last and shares[-1].last == samples
    assert all(a.last == b.first for a, b in zip(shares, shares[1:]))
    assert all(set(share.cuts) >= {share.first, share.last} for share in shares)
    assert max(map(len, shares)) <= -(-samples // 8) * -(-8 // parts)
    alone = Samples(samples)
    assert (alone.first, alone.last, alone.cuts) == (0, samples, shares[-1].cuts)
