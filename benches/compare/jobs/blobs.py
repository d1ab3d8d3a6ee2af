"""Blobs up and down, through a client with a blob cache of its own."""
import os
import shutil
from time import perf_counter_ns

from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64

from compare.worker import client

RECORD = b"\x80\x03cZODB.blob\nBlob\nq\x01.\x80\x03N."
_CHUNK = os.urandom(1 << 20)


def write(path, size):
    with open(path, "wb") as f:
        for start in range(0, size, len(_CHUNK)):
            f.write(_CHUNK[:size - start])


def _memory():
    with open("/proc/self/status") as f:
        status = dict(line.split(":", 1) for line in f)
    return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


def _watch():
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return _memory()[0]


def _store(storage, oid, path):
    txn = TransactionMetaData(description="bench")
    try:
        storage.tpc_begin(txn)
        storage.storeBlob(oid, z64, RECORD, path, "", txn)
        storage.tpc_vote(txn)
        return storage.tpc_finish(txn)
    except BaseException:
        storage.tpc_abort(txn)
        raise


def upload(kind, addr, size, directory, seconds=0, stop=None):
    """Commits blobs of `size` bytes one after the other, at least one and for `seconds`."""
    storage = client(kind, addr, blob_dir=os.path.join(directory, "cache"))
    try:
        path = os.path.join(directory, "cache", "upload")
        write(path, size)
        os.sync()                                              # what was written before does not share the disk with what is measured
        oid, before = storage.new_oid(), _watch()
        yield
        begin = perf_counter_ns()
        intervals = []
        while True:
            start = perf_counter_ns()
            tid = _store(storage, oid, path)
            end = perf_counter_ns()
            intervals.append((start, end))
            if end - begin >= seconds * 1e9:
                break
            write(path, size)
            oid = storage.new_oid()
        if stop:
            open(stop, "w").close()
        return {"begin": intervals[-1][0], "end": end, "oid": oid.hex(), "tid": tid.hex(),
                "memory": _memory()[1] - before, "intervals": intervals}
    finally:
        storage.close()


def download(kind, addr, oid, tid, directory, size):
    """Loads a blob into an empty blob cache."""
    storage = client(kind, addr, blob_dir=os.path.join(directory, "cache"))
    try:
        oid, tid = bytes.fromhex(oid), bytes.fromhex(tid)
        storage.load(oid)
        before = _watch()
        os.sync()
        yield
        begin = perf_counter_ns()
        path = storage.loadBlob(oid, tid)
        end = perf_counter_ns()
        if os.path.getsize(path) != size:
            raise RuntimeError(f"{os.path.getsize(path)} of {size} bytes arrived")
        return {"begin": begin, "end": end, "memory": _memory()[1] - before}
    finally:
        storage.close()
        shutil.rmtree(directory, ignore_errors=True)


def small(kind, addr, size, count, directory):
    """`count` downloads of different small blobs that are stored first."""
    storage = client(kind, addr, blob_dir=os.path.join(directory, "cache"))
    stored = []
    try:
        for _ in range(count):
            path = os.path.join(directory, "cache", "upload")
            write(path, size)
            oid = storage.new_oid()
            stored.append((oid, _store(storage, oid, path)))
    finally:
        storage.close()
    storage = client(kind, addr, blob_dir=os.path.join(directory, "empty"))
    try:
        yield
        begin = perf_counter_ns()
        for oid, tid in stored:
            storage.loadBlob(oid, tid)
        return {"begin": begin, "end": perf_counter_ns(), "count": count}
    finally:
        storage.close()
