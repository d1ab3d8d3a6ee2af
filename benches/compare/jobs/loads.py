"""Loads: cold, from the cache, prefetched."""
import random
import threading
from time import perf_counter_ns

from ZODB.utils import p64, u64

from compare.worker import client


def _before(storage):
    return p64(u64(storage.lastTransaction()) + 1)


def _oids(first, count, seed):
    oids = [p64(first + i) for i in range(count)]
    random.Random(seed).shuffle(oids)
    return oids


def _load_all(storage, oids, before):
    load = storage.loadBefore
    for oid in oids:
        load(oid, before)


def _threads(count, target, shares):
    """Runs target(share) in `count` threads that start together; returns begin and end."""
    barrier = threading.Barrier(count + 1)

    def work(share):
        barrier.wait(60)
        target(share)
    threads = [threading.Thread(target=work, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    barrier.wait(60)
    begin = perf_counter_ns()
    for thread in threads:
        thread.join()
    return begin, perf_counter_ns()


def cold(kind, addr, first, count, threads=1, seed=0):
    """Loads each of `count` objects once, in random order, through an empty cache."""
    storage = client(kind, addr)
    try:
        before = _before(storage)
        oids = _oids(first, count, seed)
        warm, oids = oids[:50], oids[50:]
        _load_all(storage, warm, before)
        yield
        if threads == 1:
            begin = perf_counter_ns()
            _load_all(storage, oids, before)
            end = perf_counter_ns()
        else:
            begin, end = _threads(threads, lambda share: _load_all(storage, share, before),
                                  [oids[i::threads] for i in range(threads)])
        return {"begin": begin, "end": end, "count": len(oids)}
    finally:
        storage.close()


def hits(kind, addr, first, objects, count, threads=1):
    """Loads `objects` objects over and over from the cache, `count` loads in all: the median pass, or all threads' work."""
    storage = client(kind, addr)
    try:
        before = _before(storage)
        oids = _oids(first, objects, 1)
        _load_all(storage, oids, before)
        _load_all(storage, oids, before)
        repeat, passes = max(1, count // objects // threads), []

        def work(_):
            for _ in range(repeat):
                begin = perf_counter_ns()
                _load_all(storage, oids, before)
                passes.append(perf_counter_ns() - begin)
        yield
        if threads == 1:
            work(None)
            # what the loop itself costs, so that the figure is of the call
            empty = []
            for _ in range(100):
                begin = perf_counter_ns()
                for _oid in oids:
                    pass
                empty.append(perf_counter_ns() - begin)
            return {"ns": (sorted(passes)[len(passes) // 2] - sorted(empty)[50]) / objects}
        begin, end = _threads(threads, work, range(threads))
        return {"ns": (end - begin) / (repeat * objects * threads)}
    finally:
        storage.close()


def prefetch(kind, addr, first, count, seed=0):
    """Announces `count` oids, then loads them all; the time is of both."""
    storage = client(kind, addr)
    try:
        before = _before(storage)
        oids = _oids(first, count, seed)
        yield
        begin = perf_counter_ns()
        storage.prefetch(oids, before)
        _load_all(storage, oids, before)
        return {"begin": begin, "end": perf_counter_ns(), "count": count}
    finally:
        storage.close()
