"""`zeo_rs.FileStorage` as Python sees it, where ZODB's own tests do not look."""

import os
import subprocess
import sys
import threading
import time

import pytest
import ZODB.FileStorage
import ZODB.interfaces
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadConflictError,
    ReadOnlyError,
    StorageTransactionError,
    UndoError,
)
from ZODB.utils import p64, u64, z64

from zeo_rs import FileStorage

DATA = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03}q\x01."
MAXTID = b"\x7f" + b"\xff" * 7


@pytest.fixture
def storage(tmp_path):
    storage = FileStorage(tmp_path / "Data.fs")
    yield storage
    storage.close()


def commit(storage, *stores, callback=None, **metadata):
    t = TransactionMetaData(**metadata)
    storage.tpc_begin(t)
    try:
        for oid, serial, data in stores:
            storage.store(oid, serial, data, "", t)
        storage.tpc_vote(t)
        return storage.tpc_finish(t, callback)
    except BaseException:
        storage.tpc_abort(t)
        raise


def test_is_what_zodb_asks_for(storage):
    assert isinstance(storage, ZODB.FileStorage.FileStorage)
    for name in (
        "IStorage",
        "IStorageRestoreable",
        "IStorageIteration",
        "IStorageUndoable",
        "IStorageCurrentRecordIteration",
        "IExternalGC",
    ):
        assert getattr(ZODB.interfaces, name).providedBy(storage), name
    assert not ZODB.interfaces.IBlobStorage.providedBy(storage)


def test_blobs_are_declared(tmp_path):
    storage = FileStorage(tmp_path / "Data.fs", blob_dir=tmp_path / "blobs")
    assert ZODB.interfaces.IBlobStorageRestoreable.providedBy(storage)
    storage.close()


def test_subclass_with_arguments_of_its_own(tmp_path):
    class Mine(FileStorage):
        def __init__(self, directory, *, label):
            super().__init__(os.path.join(directory, "mine.fs"))
            self.label = label

        def loadBefore(self, oid, tid):
            return "overridden", *super().loadBefore(oid, tid)

    storage = Mine(str(tmp_path), label="x")
    commit(storage, (z64, z64, DATA))
    assert storage.loadBefore(z64, MAXTID)[:2] == ("overridden", DATA)
    storage.close()


def test_not_opened():
    storage = FileStorage.__new__(FileStorage, "nowhere")
    with pytest.raises(ValueError):
        storage.loadBefore(z64, MAXTID)


def test_constructor_refuses_nonsense(tmp_path):
    with pytest.raises(ValueError):
        FileStorage(tmp_path / "Data.fs", create=True, read_only=True)
    with pytest.raises(ValueError):
        FileStorage(tmp_path / "Data.fs", stop=z64)
    with pytest.raises(FileNotFoundError):
        FileStorage(tmp_path / "Data.fs", read_only=True)


def test_conflict_carries_what_zodb_puts_in_it(storage):
    first = commit(storage, (z64, z64, DATA))
    second = commit(storage, (z64, first, DATA + b"2"))
    with pytest.raises(ConflictError) as caught:
        commit(storage, (z64, first, DATA))
    error = caught.value
    assert (error.oid, error.serials) == (z64, (second, first))
    assert error.class_name == "persistent.mapping.PersistentMapping"
    t = TransactionMetaData()
    storage.tpc_begin(t)
    with pytest.raises(ReadConflictError) as caught:
        storage.checkCurrentSerialInTransaction(z64, first, t)
    assert caught.value.serials == (second, first)
    storage.tpc_abort(t)


def test_arguments_of_the_wrong_type(storage):
    with pytest.raises(TypeError):
        storage.load("0" * 8)
    with pytest.raises(POSKeyError) as caught:
        storage.load(b"short")
    assert caught.value.args[0] == b"short"
    with pytest.raises(ValueError):
        storage.loadBefore(z64, b"short")


def test_empty_data_are_refused(storage):
    """ZODB writes a file that it cannot open again."""
    with pytest.raises(Exception, match="empty"):
        commit(storage, (z64, z64, b""))
    commit(storage, (z64, z64, DATA))


def test_finish_without_vote(storage):
    """ZODB damages its file."""
    t = TransactionMetaData()
    storage.tpc_begin(t)
    storage.store(z64, z64, DATA, "", t)
    with pytest.raises(StorageTransactionError):
        storage.tpc_finish(t)
    commit(storage, (z64, z64, DATA))
    assert len(storage) == 1


def test_another_thread_may_finish(storage):
    t = TransactionMetaData()
    storage.tpc_begin(t)
    storage.store(z64, z64, DATA, "", t)

    def finish():
        storage.tpc_vote(t)
        storage.tpc_finish(t)

    thread = threading.Thread(target=finish)
    thread.start()
    thread.join()
    assert storage.load(z64)[0] == DATA


def test_nobody_sees_a_transaction_before_its_callback_has_returned(storage):
    first = commit(storage, (z64, z64, DATA))
    in_callback, go_on = threading.Event(), threading.Event()
    seen = {}

    def callback(tid):
        # the callback itself may load, and sees the state before (ZODB deadlocks)
        seen["inside"] = storage.load(z64)[1], storage.getTid(z64), storage.lastTransaction()
        in_callback.set()
        go_on.wait(20)

    def finish():
        seen["second"] = commit(storage, (z64, first, DATA + b"2"), callback=callback)

    def read():
        seen["outside"] = storage.load(z64)[1], storage.lastTransaction()

    writer = threading.Thread(target=finish)
    writer.start()
    assert in_callback.wait(20)
    assert storage.lastTransaction() == first
    # a view of the time before needs no waiting
    assert storage.loadBefore(z64, p64(u64(first) + 1))[:2] == (DATA, first)
    reader = threading.Thread(target=read)
    reader.start()
    go_on.set()
    writer.join(20)
    reader.join(20)
    assert seen["inside"] == (first, first, first)
    assert seen["outside"] == (seen["second"], seen["second"])


def test_a_transaction_whose_callback_raises_is_not_there(tmp_path):
    """As in ZODB, whose file then has bytes behind its end that can poison later tids."""
    path = tmp_path / "Data.fs"
    storage = FileStorage(path, blob_dir=tmp_path / "blobs")
    first = commit(storage, (z64, z64, DATA))
    before = path.read_bytes()
    seen = []

    def callback(tid):
        seen.append((tid, storage.load(z64)[1], storage.getTid(z64), storage.lastTransaction()))
        raise ZeroDivisionError

    t = TransactionMetaData()
    storage.tpc_begin(t)
    (tmp_path / "upload").write_bytes(b"content")
    storage.storeBlob(p64(1), z64, DATA, str(tmp_path / "upload"), "", t)
    storage.store(z64, first, DATA + b"2", "", t)
    storage.tpc_vote(t)
    with pytest.raises(ZeroDivisionError):
        storage.tpc_finish(t, callback)
    ((tid, *inside),) = seen
    assert inside == [first] * 3
    storage.tpc_abort(t)  # what callers do after a failure; it has no effect
    assert path.read_bytes() == before
    assert [name for _, _, names in os.walk(tmp_path / "blobs") for name in names] == [".layout"]
    assert storage.load(z64) == (DATA, first) and storage.lastTransaction() == first and len(storage) == 1
    with pytest.raises(POSKeyError):
        storage.load(p64(1))
    second = commit(storage, (z64, first, DATA + b"3"))
    assert second > tid
    storage.close()
    for storage_class in (FileStorage, ZODB.FileStorage.FileStorage):
        storage = storage_class(str(path))
        assert [transaction.tid for transaction in storage.iterator()] == [first, second]
        assert storage.lastTransaction() == second
        storage.close()


def test_who_learns_of_a_transaction_from_its_callback_finds_it(storage):
    """A connection that was told loads at once, in another thread, before `tpc_finish` has returned."""
    tid = commit(storage, (z64, z64, DATA))
    threads, seen = [], []

    def callback(tid):
        def read():
            seen.append((tid, storage.loadBefore(z64, p64(u64(tid) + 1))[1], storage.loadSerial(z64, tid)))

        threads.append(threading.Thread(target=read))
        threads[-1].start()

    for n in range(300):
        tid = commit(storage, (z64, tid, DATA + b"%d" % n), callback=callback)
    for thread in threads:
        thread.join(30)
    assert len(seen) == 300
    assert [entry for entry in seen if entry[0] != entry[1]] == []


def test_replaced_conflict_resolution(storage):
    first = commit(storage, (z64, z64, DATA))
    second = commit(storage, (z64, first, DATA + b"2"))
    asked = []

    def resolve(oid, committed, old, data, committed_data=b""):
        asked.append((oid, committed, old, data))
        return DATA + b"merged"

    storage.tryToResolveConflict = resolve
    t = TransactionMetaData()
    storage.tpc_begin(t)
    storage.store(z64, first, DATA + b"3", "", t)
    assert storage.tpc_vote(t) == [z64]
    storage.tpc_finish(t)
    assert asked == [(z64, second, first, DATA + b"3")]
    assert storage.load(z64)[0] == DATA + b"merged"

    def broken(*args):
        raise ZeroDivisionError

    storage.tryToResolveConflict = broken
    with pytest.raises(ZeroDivisionError):
        commit(storage, (z64, first, DATA))


def test_undo_ids(storage):
    first = commit(storage, (z64, z64, DATA))
    commit(storage, (z64, first, DATA + b"2"))
    undone = storage.undoLog()[0]["id"]
    t = TransactionMetaData()
    storage.tpc_begin(t)
    for wrong in (b"", b"x", b"AAAAAAAAAAA="):
        with pytest.raises(UndoError):
            storage.undo(wrong, t)
    tid, oids = storage.undo(undone + b"\n", t)
    assert list(oids) == [z64]
    storage.tpc_vote(t)
    assert storage.tpc_finish(t) == tid
    assert storage.load(z64) == (DATA, tid)


def test_undo_log_filters(storage):
    tid = z64
    for n in range(5):
        tid = commit(storage, (z64, tid, DATA + b"%d" % n), user="u%d" % (n % 2), extension={"n": n, "id": "mine"})
    entries = storage.undoLog(0, 20, lambda entry: entry["user_name"] == b"u0")
    assert [entry["n"] for entry in entries] == [4, 2, 0]
    # as in ZODB, the extension wins
    assert entries[0]["id"] == "mine"
    assert [e["n"] for e in storage.undoInfo(0, -2, {"user_name": b"u1"})] == [3, 1]
    with pytest.raises(ZeroDivisionError):
        storage.undoLog(0, 20, lambda entry: 1 / 0)


def test_iterator_and_its_records(storage):
    first = commit(storage, (z64, z64, DATA), user="u", description="d", extension={"a": 1})
    iterator = storage.iterator()
    commit(storage, (z64, first, DATA + b"2"))
    (transaction,) = iterator
    assert (transaction.tid, transaction.status, transaction.user, transaction.description) == (first, " ", b"u", b"d")
    assert transaction.extension == {"a": 1}
    for _ in range(2):  # as often as one likes
        (record,) = transaction
        assert (record.oid, record.tid, record.data, record.data_txn, record.version) == (z64, first, DATA, None, "")
    with pytest.raises(StopIteration):
        next(iterator)
    iterator.close()


def test_index_of_the_tools(storage):
    tids = [commit(storage, (p64(n), z64, DATA)) for n in (1, 5, 300, 70_000)]
    index = storage._index
    assert list(index) == index.keys() == [p64(n) for n in (1, 5, 300, 70_000)]
    assert len(index) == 4 and p64(5) in index and p64(6) not in index
    assert index.minKey() == p64(1) and index.minKey(p64(6)) == p64(300) and index.maxKey() == p64(70_000)
    with pytest.raises(ValueError):
        index.minKey(p64(70_001))
    assert index[p64(1)] < index[p64(5)] and index.get(p64(2)) is None
    assert storage._ltid == tids[-1]


def test_read_only(tmp_path):
    storage = FileStorage(tmp_path / "Data.fs")
    tid = commit(storage, (z64, z64, DATA))
    reader = FileStorage(tmp_path / "Data.fs", read_only=True)
    assert reader.load(z64) == (DATA, tid) and reader.isReadOnly()
    t = TransactionMetaData()
    for call in (
        lambda: reader.tpc_begin(t),
        lambda: reader.store(z64, tid, DATA, "", t),
        lambda: reader.new_oid(),
        lambda: reader.pack(0, None),
        lambda: reader.undo(b"", t),
    ):
        with pytest.raises(ReadOnlyError):
            call()
    reader.close()
    storage.close()


def test_closed(tmp_path):
    storage = FileStorage(tmp_path / "Data.fs")
    commit(storage, (z64, z64, DATA))
    storage.close()
    with pytest.raises(ValueError):
        storage.load(z64)
    with pytest.raises(ValueError):
        commit(storage, (z64, z64, DATA))


def test_relative_name_and_another_directory(tmp_path, monkeypatch):
    """ZODB writes the index where the process happens to be when it closes."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    storage = FileStorage("Data.fs")
    assert storage.getName() == storage.sortKey() == "Data.fs"
    commit(storage, (z64, z64, DATA))
    monkeypatch.chdir(tmp_path / "b")
    storage.close()
    assert (tmp_path / "a" / "Data.fs.index").exists() and not os.listdir(tmp_path / "b")


def test_blobs_survive_a_missing_data_file(tmp_path):
    """ZODB deletes all of them."""
    storage = FileStorage(tmp_path / "Data.fs", blob_dir=tmp_path / "blobs")
    storage.close()
    kept = tmp_path / "blobs" / "0x00" / "kept"
    kept.parent.mkdir()
    kept.write_text("kept")
    os.remove(tmp_path / "Data.fs")
    try:
        FileStorage(tmp_path / "Data.fs", blob_dir=tmp_path / "blobs").close()
    except Exception as error:
        assert "blob" in str(error)
    assert kept.read_text() == "kept"


def test_log_lines_reach_logging(tmp_path):
    """Also those of the last moment."""
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(name)s %(levelname)s")
import zeo_rs
s = zeo_rs.FileStorage(sys.argv[1]); s.close()
open(sys.argv[1], "ab").write(b"x" * 200)
s = zeo_rs.FileStorage(sys.argv[1]); s.close()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "Data.fs")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("zeo_rs.storage.file") and "WARNING" in line for line in done.stdout.splitlines()), done.stdout


def test_an_abort_during_a_call_of_the_same_transaction(tmp_path):
    """The call's thread must not put its state in place of that of the transaction after it."""
    storage = FileStorage(tmp_path / "Data.fs", blob_dir=tmp_path / "blobs")
    first = commit(storage, (z64, z64, DATA))
    second = commit(storage, (z64, first, DATA + b"2"))
    one, other = TransactionMetaData(), TransactionMetaData()

    def resolve(oid, committed, old, data, committed_data=b""):
        def interfere():
            storage.tpc_abort(one)
            storage.tpc_begin(other)
            storage.store(p64(7), z64, DATA + b"other", "", other)

        thread = threading.Thread(target=interfere)
        thread.start()
        thread.join(30)
        return DATA + b"merged"

    storage.tryToResolveConflict = resolve
    storage.tpc_begin(one)
    (tmp_path / "upload").write_text("content")
    storage.storeBlob(p64(1), z64, DATA, str(tmp_path / "upload"), "", one)
    with pytest.raises(StorageTransactionError):
        storage.store(z64, first, DATA + b"3", "", one)
    storage.tpc_vote(other)
    third = storage.tpc_finish(other)
    assert storage.load(p64(7)) == (DATA + b"other", third) and storage.load(z64)[1] == second
    assert [name for _, _, names in os.walk(tmp_path / "blobs") for name in names] == [".layout"]
    storage.close()


def test_finish_and_abort_of_what_was_not_begun(storage):
    t = TransactionMetaData()
    for transaction in None, t:
        with pytest.raises(StorageTransactionError):
            storage.tpc_finish(transaction)
        storage.tpc_abort(transaction)
    storage.tpc_begin(t)
    storage.tpc_vote(t)

    def callback(tid):
        # another thread that gives up waits until it is done, and has no effect
        threads.append(threading.Thread(target=storage.tpc_abort, args=(t,)))
        threads[-1].start()

    threads = []
    storage.tpc_finish(t, callback)
    threads[0].join(30)
    assert storage._commit_lock.acquire(timeout=1)
    storage._commit_lock.release()
    assert commit(storage, (z64, z64, DATA))


def test_cleanup(tmp_path):
    storage = FileStorage(tmp_path / "Data.fs", create=True)
    storage.close()
    storage = FileStorage(tmp_path / "Data.fs", create=True)  # takes the place of the other
    assert (tmp_path / "Data.fs.lock").read_text() == f" {os.getpid()}\n"
    commit(storage, (storage.new_oid(), z64, DATA))
    storage.close()
    assert len(os.listdir(tmp_path)) > 1
    storage.cleanup()
    assert os.listdir(tmp_path) == []


def test_a_commit_does_not_queue_for_the_gil_behind_loads(storage):
    """Loads keep the GIL; without their courtesy each commit would wait for Python's switch interval, here two seconds."""
    oid = storage.new_oid()
    tid = commit(storage, (oid, z64, DATA))
    done = threading.Event()

    def load():
        while not done.is_set():
            storage.loadBefore(oid, MAXTID)

    loaders = [threading.Thread(target=load) for _ in range(4)]
    for loader in loaders:
        loader.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2)
    try:
        begin = time.monotonic()
        for _ in range(20):
            tid = commit(storage, (oid, tid, DATA))
        took = time.monotonic() - begin
    finally:
        sys.setswitchinterval(interval)
        done.set()
        for loader in loaders:
            loader.join()
    assert took < 20
