"""The operations that zodbshootout measures, through ZODB connections: pickling, the object cache and the storage together.

Each worker has a mapping of its own with some hundred objects, and all share one more for conflicts. The operations have
zodbshootout's names and meaning; the code is this project's.
"""
import contextlib
import gc
import random
from time import perf_counter_ns

import transaction
import ZODB
from persistent import Persistent
from persistent.mapping import PersistentMapping
from ZODB.Connection import TransactionMetaData
from ZODB.serialize import ObjectWriter
from ZODB.utils import z64

from compare.worker import database_storage

WORDS = random.Random(11).randbytes(1 << 16).hex()
SHARED = "shared"


class Record(Persistent):
    """An object of about 300 bytes; of two conflicting states the one stored last wins, as in zodbshootout."""

    def __init__(self, number):
        start = random.Random(number).randrange(len(WORDS) - 200)
        self.number, self.changes, self.text = number, 0, WORDS[start:start + 200]

    def _p_resolveConflict(self, old, saved, new):
        return new


def fill(kind, addr, source):
    """Copies the Data.fs `source` into an empty database."""
    from ZODB.FileStorage import FileStorage
    target, origin = database_storage(kind, addr), FileStorage(source, read_only=True)
    try:
        yield
        target.copyTransactionsFrom(origin)
        return {}
    finally:
        origin.close()
        target.close()


def prepare(kind, addr, objects, workers):
    """Makes the mappings of that many workers and the shared one."""
    db = ZODB.DB(database_storage(kind, addr))
    try:
        yield
        with db.transaction() as connection:
            table = connection.root()["shootout"] = PersistentMapping()
            for name in (*range(workers), SHARED):
                table[name] = PersistentMapping(_records(objects))
        return {}
    finally:
        db.close()


def _records(objects):
    return {i: Record(i) for i in range(objects)}


class Session:
    """An open database of one worker. `timed` adds up what the operation itself takes, without what prepares it."""

    def __init__(self, kind, addr, objects, worker):
        self.kind, self.addr, self.objects, self.worker = kind, addr, objects, worker
        self.spent, self.db = 0, None
        self.reopen()

    def reopen(self):
        """A database with empty caches, and no connection yet."""
        self.close()
        self.db = ZODB.DB(database_storage(self.kind, self.addr), cache_size=100_000)
        gc.collect()

    def close(self):
        if self.db is not None:
            self.db.close()

    @contextlib.contextmanager
    def connect(self):
        """(transaction manager, connection); the connection is closed afterwards, unless something failed"""
        manager = transaction.TransactionManager(explicit=True)
        connection = self.db.open(manager)
        yield manager, connection
        connection.close()

    def mine(self, connection, name=None):
        return connection.root()["shootout"][self.worker if name is None else name]

    def timed(self, function, *args):
        begin = perf_counter_ns()
        result = function(*args)
        self.spent += perf_counter_ns() - begin
        return result


def _read(records):
    return sum(record.changes for record in records)


def add(session):
    with session.connect() as (manager, connection):
        with manager:
            mapping = session.mine(connection)
            list(mapping)
        new = _records(session.objects)

        def work():
            with manager:
                mapping.update(new)
        session.timed(work)


def store(session):
    """Pickles that are ready, under oids that are there: the storage's own share of a commit."""
    with session.connect() as (_, connection):
        connection.transaction_manager.begin()
        writer, storage = ObjectWriter(), connection._storage
        oids = [storage.new_oid() for _ in range(session.objects)]
        pickles = [writer.serialize(Record(i)) for i in range(session.objects)]

        def work():
            txn = TransactionMetaData()
            storage.tpc_begin(txn)
            for oid, pickle in zip(oids, pickles):
                storage.store(oid, z64, pickle, "", txn)
            storage.tpc_vote(txn)
            storage.tpc_finish(txn)
        session.timed(work)
        connection.transaction_manager.abort()


def update(session, name=None, step=1):
    with session.connect() as (manager, connection):

        def work():
            with manager:
                for record in list(session.mine(connection, name).values())[session.worker % step::step]:
                    record.changes += 1
        session.timed(work)


def conflicts(session):
    """Every second object of the shared mapping, resolved in favour of the last; two workers of equal parity meet."""
    update(session, SHARED, 2)


def cold(session, prefetch=False):
    session.reopen()
    with session.connect() as (manager, connection):

        def work():
            with manager:
                records = list(session.mine(connection).values())
                if prefetch:
                    connection.prefetch(records)
                _read(records)
        session.timed(work)


def cold_prefetch(session):
    cold(session, prefetch=True)


def hot(session):
    """The storage's cache is full, the connection's empty."""
    with session.connect() as (manager, connection):
        with manager:
            _read(session.mine(connection).values())
        connection.cacheMinimize()

        def work():
            with manager:
                _read(session.mine(connection).values())
        session.timed(work)


def steamin(session):
    """The connection's cache is full: Python's share, the storage has none."""
    with session.connect() as (manager, connection):
        with manager:
            _read(session.mine(connection).values())
            session.timed(lambda: _read(session.mine(connection).values()))


def write_read(session):
    session.reopen()
    with session.connect() as (manager, connection):

        def work():
            with manager:
                for record in session.mine(connection).values():
                    record.changes += 1
            with manager:
                _read(session.mine(connection).values())
        session.timed(work)


def read_current(session):
    """A transaction of one changed object that depends on all the others."""
    with session.connect() as (manager, connection):
        with manager:
            _read(session.mine(connection).values())

        def work():
            with manager:
                records = list(session.mine(connection).values())
                records[0].changes += 1
                for record in records[1:]:
                    connection.readCurrent(record)
        session.timed(work)


def empty(session):
    """A transaction with nothing in it."""
    with session.connect() as (manager, connection):

        def work():
            manager.begin()
            manager.commit()
        session.timed(work)


def tpc(session):
    """The calls of a commit with no object in it."""
    with session.connect() as (_, connection):
        storage = connection._storage

        def work():
            txn = TransactionMetaData()
            storage.tpc_begin(txn)
            storage.tpc_vote(txn)
            storage.tpc_finish(txn)
        connection.transaction_manager.begin()
        session.timed(work)
        connection.transaction_manager.abort()


def new_oids(session):
    with session.connect() as (_, connection):
        storage = connection._storage

        def work():
            for _ in range(session.objects):
                storage.new_oid()
        connection.transaction_manager.begin()
        session.timed(work)
        connection.transaction_manager.abort()


OPERATIONS = {f.__name__: f for f in (add, store, update, conflicts, cold, cold_prefetch, hot, steamin, write_read, read_current, empty,
                                      tpc, new_oids)}


def operate(kind, addr, operation, objects, worker, loops):
    """Runs one operation some times over, the first one untimed; reports the median of what it took."""
    session, function = Session(kind, addr, objects, worker), OPERATIONS[operation]
    try:
        function(session)
        times = []
        yield
        for _ in range(loops):
            session.spent = 0
            function(session)
            times.append(session.spent)
        return {"ns": sorted(times)[loops // 2]}
    finally:
        session.close()
