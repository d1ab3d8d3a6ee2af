"""Generated databases: one Data.fs per size, made once with ZODB's own FileStorage and copied for every server.

Shape: the root names pages, a page references 1 000 records of 200-300 bytes. On top come, for pack to have work, a
second revision of every fifth record and one unreachable record for every ten. All randomness is seeded.
"""
import io
import os
import random
import shutil
import time

from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64, z64
from persistent.mapping import PersistentMapping
from zodbpickle.pickle import Pickler

PAGE = 1000
_TEXT = random.Random(7).randbytes(64 * 1024).hex()


class Ref:
    """Stands for a persistent reference while a record is pickled."""

    def __init__(self, oid):
        self.oid = oid


def record(state):
    """The two pickles of a PersistentMapping with this content, as ZODB writes them."""
    out = io.BytesIO()
    pickler = Pickler(out, 3)
    pickler.persistent_id = lambda obj: (obj.oid, PersistentMapping) if isinstance(obj, Ref) else None
    pickler.dump(PersistentMapping)
    pickler.clear_memo()
    pickler.dump({"data": state})
    return out.getvalue()


_HEAD, _TAIL = record({"id": 0xABCDEF, "body": "@"}).split(b"J\xef\xcd\xab\x00")


def leaf(number, rng):
    """A record of 200-300 bytes; spliced from a template, because pickling a million of them takes minutes."""
    size = rng.randrange(100, 200)
    start = rng.randrange(len(_TEXT) - size)
    body = _TEXT[start:start + size].encode()
    head, tail = _TAIL.split(b"X\x01\x00\x00\x00@")
    return b"".join((_HEAD, b"J", number.to_bytes(4, "little"), head, b"X", size.to_bytes(4, "little"), body, tail))


def first_leaf(objects):
    """Oid of the first record: the root is 0, pages follow, then the records up to first + objects - 1."""
    return 1 + -(-objects // PAGE)


class _Loader:
    def __init__(self, storage):
        self.storage, self.serials = storage, {}

    def commit(self, pairs):
        txn = TransactionMetaData(description="generated")
        self.storage.tpc_begin(txn)
        for oid, data in pairs:
            self.storage.store(p64(oid), self.serials.get(oid, z64), data, "", txn)
        self.storage.tpc_vote(txn)
        tid = self.storage.tpc_finish(txn)
        return tid


def generate(path, objects):
    storage = FileStorage(path, create=True)
    load, rng = _Loader(storage), random.Random(objects)
    first = first_leaf(objects)
    pages = first - 1
    updated = []
    for page in range(pages):
        ids = range(page * PAGE, min((page + 1) * PAGE, objects))
        pairs = [(1 + page, record({str(i): Ref(p64(first + i)) for i in ids}))]
        pairs += [(first + i, leaf(i, rng)) for i in ids]
        garbage = first + objects + page * (PAGE // 10)
        pairs += [(garbage + i, leaf(i, rng)) for i in range(len(ids) // 10)]
        tid = load.commit(pairs)
        updated.append((tid, [first + i for i in ids[::5]]))
    load.commit([(0, record({str(p): Ref(p64(1 + p)) for p in range(pages)}))])
    for tid, oids in updated:
        load.serials = dict.fromkeys(oids, tid)
        load.commit([(oid, leaf(oid, rng)) for oid in oids])
    storage._oid = p64(first + objects + pages * (PAGE // 10))
    storage.close()


def database(directory, objects):
    """Path of the Data.fs (with its index) holding `objects` records; generated on first use."""
    path = os.path.join(directory, f"generated-{objects}", "Data.fs")
    if not os.path.exists(path + ".done"):
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)
        os.makedirs(os.path.dirname(path))
        started = time.monotonic()
        print(f"generating {objects} objects ...", end=" ", flush=True)
        generate(path, objects)
        open(path + ".done", "w").close()
        print(f"{time.monotonic() - started:.0f} s, {os.path.getsize(path) / 1e6:.0f} MB", flush=True)
    return path


def scattered(directory, objects):
    """Path of a Data.fs of `objects` small records with random oids, with its index; generated on first use."""
    path = os.path.join(directory, f"scattered-{objects}", "Data.fs")
    if not os.path.exists(path + ".done"):
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)
        os.makedirs(os.path.dirname(path))
        storage, rng = FileStorage(path, create=True), random.Random(objects)
        load, oids = _Loader(storage), {rng.getrandbits(63) for _ in range(objects)}
        small = record({})
        load.commit([(0, small)])
        load.commit([(oid, small) for oid in oids])
        storage.close()
        open(path + ".done", "w").close()
    return path


def copy(source, directory, index=True):
    """A private copy of a database, on the disk before anything is measured beside it; returns its path."""
    os.makedirs(directory, exist_ok=True)
    target = os.path.join(directory, "Data.fs")
    shutil.copyfile(source, target)
    if index:
        shutil.copyfile(source + ".index", target + ".index")
    elif os.path.exists(target + ".index"):
        os.unlink(target + ".index")
    with open(target, "rb") as f:
        os.fsync(f.fileno())
    return target


def size(path):
    return os.path.getsize(path)


def remove(path):
    shutil.rmtree(os.path.dirname(path))
