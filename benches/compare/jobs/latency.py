"""Latency of single loads, sampled while something else goes on."""
import random
from time import perf_counter_ns, sleep

from ZODB.utils import p64, u64

from compare.worker import client


def hold(kind, addr, first, count):
    """Fills the cache and holds it, to be measured from outside."""
    storage = client(kind, addr)
    try:
        before = p64(u64(storage.lastTransaction()) + 1)
        for number in range(count):
            storage.loadBefore(p64(first + number), before)
        yield
        return {}
    finally:
        storage.close()


def sample(kind, addr, first, objects, seconds, pause=0.0005, seed=0):
    """Cold loads for `seconds`, with a pause after each; returns all their times in nanoseconds, sorted."""
    storage = client(kind, addr)
    try:
        before = p64(u64(storage.lastTransaction()) + 1)
        oids = random.Random(seed).sample(range(first, first + objects), objects)
        for number in oids[:100]:
            storage.loadBefore(p64(number), before)
        times, load = [], storage.loadBefore
        position = iter(oids[100:])
        yield
        end = perf_counter_ns() + int(seconds * 1e9)
        for number in position:
            oid = p64(number)
            begin = perf_counter_ns()
            load(oid, before)
            now = perf_counter_ns()
            times.append(now - begin)
            if now > end:
                break
            sleep(pause)
        return {"times": sorted(times), "exhausted": now <= end}
    finally:
        storage.close()
