"""Commits through the storage interface: the four calls that ZODB makes for one transaction."""
import random
from time import perf_counter_ns

from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError
from ZODB.utils import p64, z64

from compare.worker import client

_BODY = random.Random(3).randbytes(4096)


def payload(size, salt):
    """A record of about `size` bytes that unpickles to nothing in particular; differs with every salt."""
    body = salt.to_bytes(8, "big") + (_BODY * (size // len(_BODY) + 1))[:max(0, size - 40)]
    # class: persistent.mapping.PersistentMapping; state: {'data': {'b': body}}
    return (b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x01.\x80\x03}q\x02X\x04\x00\x00\x00dataq\x03}q\x04"
            b"X\x01\x00\x00\x00bq\x05B" + len(body).to_bytes(4, "little") + body + b"q\x06ss.")


def commit(storage, pairs):
    """Commits [(oid, serial, data)]; returns the tid."""
    txn = TransactionMetaData(description="bench")
    try:
        storage.tpc_begin(txn)
        store = storage.store
        for oid, serial, data in pairs:
            store(oid, serial, data, "", txn)
        storage.tpc_vote(txn)
        return storage.tpc_finish(txn)
    except BaseException:
        storage.tpc_abort(txn)
        raise


def one(kind, addr, count, size=250):
    """`count` transactions of one own object each, one after the other."""
    storage = client(kind, addr)
    try:
        oid = storage.new_oid()
        tid = z64
        for i in range(5):
            tid = commit(storage, [(oid, tid, payload(size, i))])
        data = [payload(size, i) for i in range(count)]
        times = []
        yield
        begin = last = perf_counter_ns()
        for record in data:
            tid = commit(storage, [(oid, tid, record)])
            now = perf_counter_ns()
            times.append(now - last)
            last = now
        return {"begin": begin, "end": last, "count": count, "times": sorted(times)}
    finally:
        storage.close()


def bulk(kind, addr, objects, size=250):
    """One transaction of `objects` new objects, from tpc_begin to tpc_finish."""
    storage = client(kind, addr)
    try:
        oids = [storage.new_oid() for _ in range(objects)]
        triples = [(oid, z64, payload(size, i)) for i, oid in enumerate(oids)]
        commit(storage, [(storage.new_oid(), z64, payload(size, 0))])
        yield
        begin = perf_counter_ns()
        commit(storage, triples)
        return {"begin": begin, "end": perf_counter_ns(), "count": objects}
    finally:
        storage.close()


def contended(kind, addr, oid, count, size=250):
    """`count` successful commits to one object that others commit to as well; a conflict reloads and tries again."""
    storage = client(kind, addr)
    try:
        oid = p64(oid)
        data = payload(size, 1)
        conflicts = 0
        yield
        begin = perf_counter_ns()
        for _ in range(count):
            while True:
                try:
                    commit(storage, [(oid, storage.getTid(oid), data)])
                    break
                except ConflictError:
                    conflicts += 1
        return {"begin": begin, "end": perf_counter_ns(), "count": count, "conflicts": conflicts}
    finally:
        storage.close()


def conflicts(kind, addr, oid, count, size=250):
    """`count` transactions that fail: each stores one object with an outdated serial, then aborts."""
    storage = client(kind, addr)
    try:
        oid = p64(oid)
        old = storage.load(oid)[1]
        commit(storage, [(oid, old, payload(size, 0))])
        data = payload(size, 1)
        yield
        begin = perf_counter_ns()
        for _ in range(count):
            try:
                commit(storage, [(oid, old, data)])
            except ConflictError:
                continue
            raise RuntimeError("an outdated serial was accepted")
        return {"begin": begin, "end": perf_counter_ns(), "count": count}
    finally:
        storage.close()
