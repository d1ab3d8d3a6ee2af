"""Latency of single loads, sampled while something else goes on."""
import os
import random
from time import perf_counter_ns, sleep, time

from ZODB.utils import p64, u64, z64

from compare.worker import client

from .commits import commit, payload


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


def sample(kind, addr, first, objects, seconds, pause=0.0005, seed=0, stop=None):
    """Cold loads with a pause after each, for `seconds` or until the file `stop` appears; returns (begin, ns) of each."""
    storage = client(kind, addr)
    try:
        before = p64(u64(storage.lastTransaction()) + 1)
        oids = random.Random(seed).sample(range(first, first + objects), objects)
        for number in oids[:100]:
            storage.loadBefore(p64(number), before)
        samples, load = [], storage.loadBefore
        yield
        end = perf_counter_ns() + int(seconds * 1e9)
        for count, number in enumerate(oids[100:]):
            oid = p64(number)
            begin = perf_counter_ns()
            load(oid, before)
            now = perf_counter_ns()
            samples.append((begin, now - begin))
            if now > end or stop and count % 20 == 0 and os.path.exists(stop):
                break
            sleep(pause)
        return {"samples": samples}
    finally:
        storage.close()


def commit_bytes(kind, addr, megabytes, seconds, stop):
    """Transactions of `megabytes` each in records of 10 kB, one after the other."""
    storage = client(kind, addr)
    try:
        records = [(storage.new_oid(), payload(10_000, i)) for i in range(megabytes * 100)]
        yield
        begin, intervals, serial = perf_counter_ns(), [], z64
        while not intervals or perf_counter_ns() - begin < seconds * 1e9:
            start = perf_counter_ns()
            serial = commit(storage, [(oid, serial, data) for oid, data in records])
            intervals.append((start, perf_counter_ns()))
        open(stop, "w").close()
        return {"intervals": intervals}
    finally:
        storage.close()


def pack(kind, addr, stop=None):
    """Packs to now and waits for it."""
    storage = client(kind, addr)
    try:
        yield
        begin = perf_counter_ns()
        storage.pack(time(), wait=True)
        end = perf_counter_ns()
        if stop:
            open(stop, "w").close()
        return {"begin": begin, "end": end, "intervals": [(begin, end)]}
    finally:
        storage.close()
