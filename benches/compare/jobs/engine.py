"""FileStorage in this process: ZODB's ("zodb") or the Rust engine ("rs")."""
import gc as collector
import os
import random
import threading
import time
from time import perf_counter_ns

from ZODB.serialize import referencesf
from ZODB.utils import maxtid, p64, z64

from .blobs import _memory, _watch
from .commits import commit as commit_pairs
from .commits import payload


def _open(kind, path, **options):
    if kind == "zodb":
        from ZODB.FileStorage import FileStorage
    else:
        from zeo_rs import FileStorage
    return FileStorage(path, **options)


def opened(kind, addr, path, index):
    if not index and os.path.exists(path + ".index"):
        os.unlink(path + ".index")
    _open(kind, os.path.join(os.path.dirname(path), "small.fs"), create=True).close()      # imports are not measured
    yield
    begin = perf_counter_ns()
    storage = _open(kind, path)
    elapsed = perf_counter_ns() - begin
    storage.close()                                            # writes the index again
    return {"ns": elapsed}


def index_memory(kind, addr, path):
    small = os.path.join(os.path.dirname(path), "small.fs")
    _open(kind, small, create=True).close()                    # imports are not the index's
    collector.collect()
    with open("/proc/self/status") as f:
        before = _anonymous(f)
    yield
    storage = _open(kind, path)
    collector.collect()
    with open("/proc/self/status") as f:
        after = _anonymous(f)
    storage.close()
    return {"bytes": after - before}


def _anonymous(status):
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def load(kind, addr, path, first, objects, count):
    storage = _open(kind, path)
    try:
        rng = random.Random(5)
        oids = [p64(first + rng.randrange(objects)) for _ in range(count)]
        load = storage.loadBefore
        for oid in oids[:1000]:
            load(oid, maxtid)
        yield
        begin = perf_counter_ns()
        for oid in oids:
            load(oid, maxtid)
        return {"ns": perf_counter_ns() - begin}
    finally:
        storage.close()


def beside(kind, addr, path, first, objects, seconds, threads):
    """Loads in `threads` threads while one more commits an object of its own without pause."""
    storage = _open(kind, path)
    try:
        oid, done, loads, commits, times = storage.new_oid(), threading.Event(), [0] * threads, [0], [[] for _ in range(threads)]

        def reader(number):
            rng, load, mine = random.Random(number), storage.loadBefore, times[number]
            oids = [p64(first + rng.randrange(objects)) for _ in range(5000)]
            while not done.is_set():
                for place, key in enumerate(oids):
                    if place % 50 == 0:
                        begin = perf_counter_ns()
                        load(key, maxtid)
                        mine.append(perf_counter_ns() - begin)
                        if done.is_set():
                            break
                    else:
                        load(key, maxtid)
                    loads[number] += 1

        def writer():
            tid = z64
            while not done.is_set():
                tid = commit_pairs(storage, [(oid, tid, payload(250, commits[0]))])
                commits[0] += 1
        workers = [threading.Thread(target=reader, args=(n,)) for n in range(threads)] + [threading.Thread(target=writer)]
        yield
        begin = perf_counter_ns()
        for thread in workers:
            thread.start()
        time.sleep(seconds)
        done.set()
        for thread in workers:
            thread.join()
        elapsed = (perf_counter_ns() - begin) / 1e9
        sampled = sorted(t for mine in times for t in mine)
        return {"rates": {"": sum(loads) / elapsed, "commits": commits[0] / elapsed,
                          "p99": sampled[int(len(sampled) * 0.99)] / 1e3}}
    finally:
        storage.close()


def iterate(kind, addr, path):
    storage = _open(kind, path)
    try:
        yield
        begin, size = perf_counter_ns(), 0
        for transaction in storage.iterator():
            for record in transaction:
                size += len(record.data or b"")
        return {"ns": perf_counter_ns() - begin, "size": size}
    finally:
        storage.close()


def commit(kind, addr, path, count, repeat=30):
    """Median time of transactions of `count` new objects, from tpc_begin to tpc_finish."""
    storage = _open(kind, path)
    try:
        os.sync()                                              # what others have written does not share the disk with what is measured
        yield
        times = []
        for _ in range(repeat if count == 1 else 9):
            triples = [(storage.new_oid(), z64, payload(250, i)) for i in range(count)]
            begin = perf_counter_ns()
            commit_pairs(storage, triples)
            times.append(perf_counter_ns() - begin)
        return {"ns": sorted(times)[len(times) // 2]}
    finally:
        storage.close()


def pack(kind, addr, path, gc):
    storage = _open(kind, path, pack_gc=gc)
    try:
        before = _watch()
        yield
        begin = perf_counter_ns()
        storage.pack(time.time(), referencesf)
        return {"ns": perf_counter_ns() - begin, "bytes": _memory()[1] - before}
    finally:
        storage.close()
