"""``zeo_rs.ClientStorage`` against ZEO's own server, as ZODB and its users call it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import transaction
import ZODB
import ZODB.blob
import ZODB.interfaces
from BTrees.Length import Length
from peers import ENCODINGS, Proxy, Server, free_port
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from ZODB import POSException
from ZODB.Connection import TransactionMetaData
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import p64, u64, z64

import zeo_rs
from zeo_rs.clientstorage import ClientStorage
from zeo_rs.exceptions import ClientDisconnected, ClientStorageError, ServerException

PATIENCE = 60  # seconds that nothing takes unless it hangs


@contextlib.contextmanager
def zeo_server(encoding, **options):
    """Killed at the end: ZEO's server under uvloop does not always stop when asked to."""
    with Server("zeo", encoding, **options) as server:
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="module", params=ENCODINGS)
def server(request):
    with zeo_server(request.param, unix=request.param == "M5") as server:
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
        # within a second, on a machine with time to spare
        assert time.monotonic() - since < 10


def why_not_connected(text, *args, **options):
    """A client that does not get its connection says `text`; it is given more time if that has not been found out yet."""
    for wait_timeout in (0.5, 2, 8, 32):
        with pytest.raises(ClientDisconnected) as raised:
            ClientStorage(*args, **options, wait_timeout=wait_timeout)
        if text in str(raised.value):
            return
    raise raised.value


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


def test_pack():
    with zeo_server("M5") as server, opened(server.address) as storage:
        check_pack(storage)


def check_pack(storage):
    db = ZODB.DB(storage)
    with db.transaction() as conn:
        conn.root()["gone"] = PersistentMapping()
    with db.transaction() as conn:
        oid = conn.root()["gone"]._p_oid
        del conn.root()["gone"]
    storage.pack(days=1)
    storage.getTid(oid)
    now = time.time()
    storage.pack(now)
    with pytest.raises(POSException.POSKeyError):
        storage.getTid(oid)
    # An error of a class that clients do not know.
    transactions = storage.iterator()
    next(transactions)
    with pytest.raises(ServerException) as raised:
        storage._iterator_record_start(transactions._generation, transactions._iid, p64(1))
    assert raised.value.args[0] == "builtins.Exception"


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
    why_not_connected("unknown storage: nope", server.address, storage="nope")


def test_nobody_listens():
    why_not_connected("refused", free_port())
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


def begun(storage):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    return txn


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_restart_is_not_seen(encoding):
    with zeo_server(encoding) as server, opened(server.address) as storage:
        oid = storage.new_oid()
        tid = commit(storage, (oid, z64, b"x"))
        before = after(tid)
        fresh = ClientStorage(server.address, wait_timeout=PATIENCE)
        txn = begun(storage)
        storage.store(oid, tid, b"lost", "", txn)
        server.kill()
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
        with zeo_server("Z5") as server:
            storage.new_addr(server.address)
            until(storage.is_connected, "the first connection")
            commit(storage, (storage.new_oid(), z64, b"x"))


def test_of_several_addresses_one_answers(server):
    with opened([("127.0.0.1", free_port()), server.address]) as storage:
        storage.ping()


def test_missed_transactions_are_caught_up():
    """Within the server's memory by invalidation, beyond it by dropping the cache, with an event."""
    for missed, dropped in (3, False), (15, True):
        with (
            zeo_server("Z5", options="invalidation-queue-size 10") as server,
            Proxy(server.address) as proxy,
            opened(proxy.address) as storage,
            opened(server.address) as other,
        ):
            events = []
            storage._stale_cache = lambda events=events, storage=storage: events.append(storage.cache_stats())
            oids = [storage.new_oid() for _ in range(2)]
            tid = commit(storage, *((oid, z64, b"old") for oid in oids))
            db = Recorder()
            storage.registerDB(db)
            proxy.cut()
            last = tid
            for number in range(missed):
                last = commit(other, (oids[0], last, b"%d" % number))
            proxy.restore()
            until(lambda: storage.lastTransaction() == last, "the verification")
            assert storage.load(oids[0]) == (b"%d" % (missed - 1), last)
            assert [event["revisions"] > 0 for event in events] == [True] * dropped
            loads = storage.server_status()["loads"]
            assert storage.load(oids[1]) == (b"old", tid)
            assert storage.server_status()["loads"] - loads == dropped
            assert "cache" in db.told and (last, {oids[0]} if not dropped else set()) in db.told


class Recorder:
    """Takes the place of a database."""

    references = transform_record_data = untransform_record_data = None

    def __init__(self):
        self.told = []

    def invalidate(self, tid, oids, version=""):
        self.told.append((tid, set(oids)))

    def invalidateCache(self):
        self.told.append("cache")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_database_that_cannot_be_told_of_changes_forgets_everything(server, storage):
    class Unable(Recorder):
        def invalidate(self, tid, oids, version=""):
            raise ZeroDivisionError

    db = Unable()
    storage.registerDB(db)
    with opened(server.address) as other:
        tid = commit(other, (other.new_oid(), z64, b"x"))
    until(lambda: storage.lastTransaction() == tid, "the commit")
    assert db.told == ["cache"]


def test_the_cache_file_is_warm(server, tmp_path):
    with opened(server.address) as writer:
        oids = [writer.new_oid() for _ in range(50)]
        tid = commit(writer, *((oid, z64, oid * 9) for oid in oids))
        path = tmp_path / "cache.zrc"
        with opened(server.address, cache=str(path)) as storage:
            for oid in oids:
                storage.load(oid)
            # A second user of the file gets a cache of its own.
            with opened(server.address, cache=str(path)) as second:
                assert second.cache_stats()["revisions"] == 0
                assert second.load(oids[0]) == (oids[0] * 9, tid)
        out = subprocess.run(
            [sys.executable, "-m", "zeo_rs.cli", "cache-stats", "--json", path], capture_output=True, check=True
        )
        stats = json.loads(out.stdout)
        assert (stats["current"], stats["last_tid"], stats["largest"]) == (50, tid.hex(), 72)
        changed = commit(writer, (oids[0], tid, b"changed"))
        with opened(server.address, client="cache", var=str(tmp_path), cache=str(path)) as storage:
            assert storage.lastTransaction() == changed
            loads = storage.server_status()["loads"]
            assert storage.load(oids[0]) == (b"changed", changed)
            for oid in oids[1:]:
                assert storage.load(oid) == (oid * 9, tid)
            assert storage.server_status()["loads"] == loads + 1


def test_a_killed_client_leaves_no_wrong_revision(server, tmp_path):
    """Killed while it loads and is told of changes; whoever goes on with its file sees what the server has."""
    path = str(tmp_path / "cache.zrc")
    script = (
        "import random, sys\n"
        "from zeo_rs.clientstorage import ClientStorage\n"
        f"storage = ClientStorage({server.address!r}, cache={path!r}, cache_size=20000, wait_timeout={PATIENCE})\n"
        "oids = [bytes.fromhex(oid) for oid in sys.argv[1:]]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    storage.load(random.choice(oids))\n"
    )
    with opened(server.address) as writer:
        oids = [writer.new_oid() for _ in range(40)]
        tids = dict.fromkeys(oids, commit(writer, *((oid, z64, oid * 20) for oid in oids)))
        warm = 0
        for life in range(5):
            arguments = [sys.executable, "-c", script, *(oid.hex() for oid in oids)]
            with subprocess.Popen(arguments, stdout=subprocess.PIPE) as child:
                assert child.stdout.readline() == b"ready\n"
                for number in range(60):
                    oid = oids[(number * 7 + life) % 40]
                    tids[oid] = commit(writer, (oid, tids[oid], b"%d/%d " % (life, number) * 20))
                child.kill()
            tids[oids[0]] = commit(writer, (oids[0], tids[oids[0]], b"after %d" % life))
            with opened(server.address, cache=path, cache_size=20000) as storage:
                for oid in oids:
                    assert storage.load(oid) == (writer.loadSerial(oid, tids[oid]), tids[oid])
                warm += storage.cache_stats()["hits"]
        assert warm > 0, "the file was used"


def test_a_cache_newer_than_the_server_is_moved_aside(tmp_path):
    """A restored backup: the client starts, and serves nothing that was rolled back."""
    path = str(tmp_path / "cache.zrc")
    with zeo_server("M5") as server, opened(server.address, cache=path) as storage:
        oid = storage.new_oid()
        commit(storage, (oid, z64, b"rolled back"))
    with zeo_server("M5") as server, opened(server.address, cache=path) as storage:
        with pytest.raises(POSException.POSKeyError):
            storage.load(oid)
        commit(storage, (oid, z64, b"other"))
        assert storage.load(oid)[0] == b"other"
        assert os.path.exists(path + ".aside")
    # Set back and gone on: nothing is older, but the newest revision is another one.
    with zeo_server("M5") as server, opened(server.address) as storage:
        commit(storage, (p64(77), z64, b"newer than all"))
        with opened(server.address, cache=path) as storage:
            with pytest.raises(POSException.POSKeyError):
                storage.load(oid)


def test_zeo_cache_files_are_not_taken_for_ours(server, tmp_path):
    path = tmp_path / "cache.zec"
    path.write_bytes(b"ZEC3" + bytes(1000))
    with opened(server.address, cache=str(path)) as storage:
        commit(storage, (storage.new_oid(), z64, b"x"))
    assert (tmp_path / "cache.zec.aside").read_bytes()[:4] == b"ZEC3"
    with pytest.raises(TypeError, match="path"):
        ClientStorage(server.address, cache=object())


@pytest.mark.parametrize("shared", [False, True])
def test_blobs(shared, tmp_path):
    with zeo_server("M5") as server:
        directory = str(server.directory / "blobs-1") if shared else str(tmp_path / "blobs")
        options = {"blob_dir": directory, "shared_blob_dir": shared}
        content = os.urandom(200_000)
        with opened(server.address, **options) as storage:
            db = ZODB.DB(storage)
            with db.transaction() as conn:
                for name, data in ("large", content), ("empty", b""):
                    conn.root()[name] = ZODB.blob.Blob(data)
            with db.transaction() as conn:
                oids = [conn.root()[name]._p_oid for name in ("large", "empty")]
                assert conn.root()["large"].open().read() == content
            serial = storage.getTid(oids[0])
            assert open(storage.loadBlob(oids[0], serial), "rb").read() == content
            with pytest.raises(POSException.POSKeyError):
                storage.loadBlob(oids[0], p64(5))
            # An aborted transaction leaves nothing.
            manager = transaction.TransactionManager()
            conn = db.open(manager)
            conn.root()["lost"] = ZODB.blob.Blob(b"lost")
            manager.get().join(Failing())
            with pytest.raises(ZeroDivisionError):
                manager.commit()
            manager.abort()
            conn.close()
            found = [name for _, _, names in os.walk(directory) for name in names if name.endswith((".tmp", ".received"))]
            assert found == []
        if not shared:
            options["blob_dir"] = str(tmp_path / "others")
            with opened(server.address, **options) as storage:
                results = []

                def work():
                    for oid, data in zip(oids, (content, b"")):
                        with storage.openCommittedBlobFile(oid, serial) as file:
                            results.append(file.read() == data)

                threads = [threading.Thread(target=work) for _ in range(6)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(PATIENCE)
                assert results == [True] * 12
    with opened(free_port(), wait=False) as storage, pytest.raises(POSException.Unsupported):
        storage.loadBlob(z64, z64)


class Failing:
    """A resource manager that fails last."""

    transaction_manager = transaction.manager

    def sortKey(self):
        return "~~"

    def tpc_begin(self, txn):
        pass

    commit = tpc_finish = tpc_abort = abort = tpc_begin

    def tpc_vote(self, txn):
        raise ZeroDivisionError


def test_the_blob_cache_is_bounded(tmp_path):
    with zeo_server("Z5") as server:
        with opened(
            server.address, blob_dir=str(tmp_path / "b"), blob_cache_size=50_000, blob_cache_size_check=10
        ) as storage:
            db = ZODB.DB(storage)
            with db.transaction() as conn:
                for number in range(30):
                    conn.root()[number] = ZODB.blob.Blob(bytes(10_000))
            with db.transaction() as conn:
                for number in range(30):
                    assert len(conn.root()[number].open().read()) == 10_000

            def size():
                sizes = []
                for file in tmp_path.rglob("*.blob"):
                    with contextlib.suppress(FileNotFoundError):  # removed at this moment
                        sizes.append(file.stat().st_size)
                return sum(sizes)

            until(lambda: size() <= 50_000, "the cleaning")


def test_conflicts_are_resolved_by_the_client():
    with zeo_server("M5", options="client-conflict-resolution true") as server:
        with opened(server.address) as one, opened(server.address) as two:
            db1 = ZODB.DB(one)
            with db1.transaction() as conn:
                conn.root()["length"] = Length()
            db2 = ZODB.DB(two)
            managers = [transaction.TransactionManager() for _ in range(2)]
            conns = [db.open(manager) for db, manager in zip((db1, db2), managers)]
            until(lambda: managers[1].begin() and "length" in conns[1].root(), "the first commit")
            for conn, change in zip(conns, (10, 5)):
                conn.root()["length"].change(change)
            for manager in managers:
                manager.commit()
            managers[1].begin()
            assert conns[1].root()["length"]() == 15
            for conn in conns:
                conn.root()["conflict"] = 1
            managers[0].commit()
            with pytest.raises(POSException.ConflictError):
                managers[1].commit()
            managers[1].abort()
            for conn in conns:
                conn.close()


def test_fork():
    """A child gets a connection of its own, and the parent keeps its."""
    with zeo_server("M5") as server, opened(server.address) as storage:
        oid = storage.new_oid()
        tid = commit(storage, (oid, z64, b"x"))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                result = repr((storage.load(oid) == (b"x", tid), storage.lastTransaction() >= tid))
                second = commit(storage, (oid, tid, b"child"))
                os.write(write, result.encode() + b" " + second.hex().encode())
                storage.close()
            except BaseException as error:
                os.write(write, repr(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            told = pipe.read().decode()
        os.waitpid(child, 0)
        assert told.startswith("(True, True) "), told
        second = bytes.fromhex(told.split()[-1])
        until(lambda: storage.lastTransaction() == second, "the child's commit")
        assert storage.load(oid) == (b"child", second)
        commit(storage, (oid, second, b"parent"))


def test_a_waiting_call_can_be_interrupted(server):
    with opened(server.address) as holder, opened(server.address) as storage:
        txn, waiting = begun(holder), begun(storage)
        holder.tpc_vote(txn)

        def interrupt():
            until(lambda: holder.server_status()["waiting"], "the waiting vote")
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            storage.tpc_vote(waiting)
        holder.tpc_abort(txn)
        storage.tpc_abort(waiting)
        commit(storage, (storage.new_oid(), z64, b"x"))
