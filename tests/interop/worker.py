"""A client process: `worker.py zeo|rust` runs the methods that its parent names, one line of base64 pickle each way."""

import base64
import os
import pickle
import random
import sys
import tempfile
import time

# the pipe is ours alone: whatever libraries print goes to stderr
_out = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)

import transaction  # noqa: E402
import ZODB  # noqa: E402
from BTrees.Length import Length  # noqa: E402
from BTrees.OOBTree import OOBTree  # noqa: E402
from persistent.mapping import PersistentMapping  # noqa: E402
from ZODB.blob import Blob  # noqa: E402
from ZODB.Connection import TransactionMetaData  # noqa: E402
from ZODB.POSException import ConflictError  # noqa: E402
from ZODB.utils import u64, z64  # noqa: E402

DEADLINE = 60


def client_storage(kind):
    if kind == "zeo":
        from ZEO.ClientStorage import ClientStorage
    else:
        from zeo_rs import ClientStorage
    return ClientStorage


def data(n):
    """A record as ZODB writes it, differing by `n`."""
    return b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03}q\x01X\x01\x00\x00\x00nq\x02K" + bytes([n]) + b"s."


class Worker:
    def __init__(self, kind):
        self.kind = kind

    # -- database

    def connect(self, address, **options):
        options.setdefault("wait_timeout", DEADLINE)
        self.blob_dir = tempfile.TemporaryDirectory(prefix="zeo")
        options.setdefault("blob_dir", self.blob_dir.name)
        self.storage = client_storage(self.kind)(address, **options)
        self.db = self.conn = None

    def root(self):
        if self.db is None:
            self.db = ZODB.DB(self.storage)
            self.tm = transaction.TransactionManager()
            self.conn = self.db.open(self.tm)
        return self.conn.root()

    def set(self, key, value, description=None):
        """Commits `root[key] = PersistentMapping(value=value)`; returns its tid."""
        self.root()
        self.tm.begin()
        if key in self.root():
            self.root()[key]["value"] = value
        else:
            self.root()[key] = PersistentMapping(value=value)
        if description:
            self.tm.get().note(description)
        self.tm.commit()
        self.conn.cacheMinimize()
        self.root()[key]["value"]
        return self.root()[key]._p_serial

    def get(self, key):
        self.root()
        self.tm.begin()
        value = self.root()[key]["value"]
        self.tm.abort()
        return value

    def wait_for(self, key, value):
        """Until the invalidation for another client's commit has come."""
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                if self.get(key) == value:
                    return True
            except KeyError:
                pass
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)

    def begin(self, key):
        """Starts a transaction and reads."""
        self.root()
        self.tm.begin()
        return self.root()[key]["value"]

    def read(self, key):
        """Reads in the transaction that `begin` started, from the storage."""
        self.root()[key]._p_deactivate()
        return self.root()[key]["value"]

    def change(self, key, value):
        self.root()[key]["value"] = value

    def commit(self):
        try:
            self.tm.commit()
        finally:
            self.tm.abort()

    def abort(self):
        self.tm.abort()

    def resolve_prepare(self, key):
        self.root()
        self.tm.begin()
        self.root()[key] = OOBTree()
        self.root()[key]["length"] = Length()
        self.tm.commit()

    def resolve_change(self, key, name):
        """Changes a BTree and a Length in an open transaction."""
        self.root()
        self.tm.begin()
        tree = self.root()[key]
        tree[name] = name
        tree["length"].change(1)

    def resolve_read(self, key):
        self.root()
        self.tm.begin()
        tree = self.root()[key]
        return sorted(name for name in tree if name != "length"), tree["length"]()

    def undo(self, description):
        """Undoes the newest transaction of that description."""
        self.root()
        self.tm.begin()
        found = [d["id"] for d in self.db.undoInfo(0, -100) if d["description"] == description]
        self.db.undo(found[0], self.tm.get())
        self.tm.get().note("undo " + description)
        self.tm.commit()

    def undo_descriptions(self):
        self.root()
        return [d["description"] for d in self.db.undoInfo(0, -100)]

    def history(self, key):
        self.root()
        self.tm.begin()
        oid = self.root()[key]._p_oid
        return [(d["tid"], d["description"], d["size"]) for d in self.db.history(oid, 10)]

    def put_blob(self, key, content):
        self.root()
        self.tm.begin()
        self.root()[key] = Blob(content)
        self.tm.commit()

    def get_blob(self, key):
        self.root()
        self.tm.begin()
        with self.root()[key].open() as f:
            return f.read()

    def pack(self):
        self.root()
        self.db.pack(time.time() + 1)
        return len(self.storage)

    def race(self, steps):
        """Two objects that every transaction changes together: returns what was seen apart."""
        self.root()
        seen = []
        for _ in range(steps):
            self.tm.begin()
            root = self.root()
            # one half comes from the storage, the other may come from the connection's cache
            root[random.choice(("race1", "race2"))]._p_deactivate()
            one, two = root["race1"]["value"], root["race2"]["value"]
            if one != two:
                seen.append((one, two))
            if random.random() < 0.4:
                root["race1"]["value"] = one + 1
                root["race2"]["value"] = two + 1
            try:
                self.tm.commit()
            except ConflictError:
                self.tm.abort()
        return seen

    def reconnect_wait(self):
        """Until a transaction works again after the server came back."""
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                self.root()
                self.tm.begin()
                self.storage.history(z64)  # a round trip, whatever the cache holds
                self.conn.cacheMinimize()
                self.root().keys()
                self.tm.abort()
                return True
            except Exception:
                self.tm.abort()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    # -- storage

    def new_oids(self, count):
        return [self.storage.new_oid() for _ in range(count)]

    def store(self, oid, serial, n):
        t = TransactionMetaData(description="store %d" % n)
        self.storage.tpc_begin(t)
        try:
            self.storage.store(oid, serial, data(n), "", t)
            self.storage.tpc_vote(t)
            return self.storage.tpc_finish(t)
        except BaseException:
            self.storage.tpc_abort(t)
            raise

    def begin_and_store(self, oid, serial, n, vote=False):
        """Leaves a transaction open, and voted if asked."""
        self.pending = TransactionMetaData()
        self.storage.tpc_begin(self.pending)
        self.storage.store(oid, serial, data(n), "", self.pending)
        if vote:
            self.storage.tpc_vote(self.pending)

    def vote(self):
        return self.storage.tpc_vote(self.pending)

    def finish(self):
        return self.storage.tpc_finish(self.pending)

    def give_up(self):
        self.storage.tpc_abort(self.pending)

    def check_current(self, oid, serial):
        t = TransactionMetaData()
        self.storage.tpc_begin(t)
        try:
            self.storage.checkCurrentSerialInTransaction(oid, serial, t)
            self.storage.tpc_vote(t)
        finally:
            self.storage.tpc_abort(t)

    def delete(self, oid, serial):
        t = TransactionMetaData()
        self.storage.tpc_begin(t)
        try:
            self.storage.deleteObject(oid, serial, t)
            self.storage.tpc_vote(t)
            return self.storage.tpc_finish(t)
        except BaseException:
            self.storage.tpc_abort(t)
            raise

    def storage_call(self, name, *args):
        return getattr(self.storage, name)(*args)

    def storage_len(self):
        return len(self.storage)

    def iterate(self, start=None, stop=None):
        return [
            (t.tid, t.status, t.user, t.description, t.extension, [(r.oid, r.tid, r.data, r.data_txn) for r in t])
            for t in self.storage.iterator(start, stop)
        ]

    def record_iternext(self):
        found, cursor = [], None
        while True:
            oid, tid, record, cursor = self.storage.record_iternext(cursor)
            found.append((oid, tid, record))
            if cursor is None:
                return found

    def is_connected(self):
        return bool(self.storage.is_connected())

    def seen_tid(self):
        return u64(self.storage.lastTransaction())

    def close(self):
        if self.db is not None:
            self.tm.abort()
            self.conn.close()
            self.db.close()
        else:
            self.storage.close()
        self.blob_dir.cleanup()


def main():
    worker = Worker(sys.argv[1])
    for line in sys.stdin.buffer:
        method, args, kw = pickle.loads(base64.b64decode(line))
        try:
            answer = True, getattr(worker, method)(*args, **kw)
        except Exception as error:
            try:
                text = str(error)
            except Exception as unprintable:  # ZODB's MultipleUndoErrors, as it comes out of ZEO under msgpack
                text = repr(unprintable)
            answer = False, ([c.__name__ for c in type(error).__mro__], text)
        _out.write(base64.b64encode(pickle.dumps(answer)) + b"\n")
        _out.flush()
    storage = getattr(worker, "storage", None)
    if storage is not None:
        worker.close()


if __name__ == "__main__":
    main()
