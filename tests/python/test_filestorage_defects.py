"""Defects of ZODB's FileStorage, one by one as `docs/filestorage.md` lists them: each has a test here that ZODB fails.

Those of pack are in tests/rust/pack.rs; that loads do not wait for a sync, and that the index is saved on request and
synced, in tests/rust/filestorage.
"""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ZODB.blob
import ZODB.FileStorage
from zc.lockfile import LockError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError
from ZODB.serialize import referencesf
from ZODB.utils import p64, u64, z64

from zeo_rs import FileStorage

DATA = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03}q\x01."
BLOB = b"\x80\x03cZODB.blob\nBlob\nq\x00.\x80\x03N."
FIXTURES = Path(__file__).parents[1] / "fixtures" / "filestorage"


def commit(storage, *calls, **begin):
    t = TransactionMetaData()
    storage.tpc_begin(t, **begin)
    for name, *args in calls:
        getattr(storage, name)(*args, t)
    storage.tpc_vote(t)
    return storage.tpc_finish(t)


def store(oid, serial, data=DATA):
    return "store", oid, serial, data, ""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "Data.fs"


@pytest.fixture
def storage(path):
    storage = FileStorage(path, blob_dir=path.with_name("blobs"))
    yield storage
    storage.close()


def fixture(name, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / name)
    return tmp_path / name / "Data.fs"


def test_empty_data(storage, path):
    tid = commit(storage, store(z64, z64))
    for call in (store(z64, tid, b""), ("restore", p64(1), tid, b"", "", None)):
        with pytest.raises(Exception, match="empty"):
            commit(storage, call)
        storage.tpc_abort(storage.tpc_transaction())
    storage.tryToResolveConflict = lambda *args: b""
    with pytest.raises(Exception, match="empty"):
        commit(storage, store(z64, p64(1)))
    storage.tpc_abort(storage.tpc_transaction())
    assert [t.tid for t in storage.iterator()] == [tid]


@pytest.mark.parametrize("tail", [b"\0" * 500, b"z" * 500, "checkpoint", "cut"], ids=["zeros", "text", "checkpoint", "cut"])
def test_last_transaction_after_recovery(storage, path, tail):
    first = commit(storage, store(z64, z64))
    end = storage.getSize()
    commit(storage, store(z64, first, DATA + b"2" * 200))
    storage.close()
    content = path.read_bytes()
    if tail == "checkpoint":
        content = content[: end + 16] + b"c" + content[end + 17 :]
    elif tail == "cut":
        content = content[:-50]
    else:
        content = content[:end] + tail
    path.write_bytes(content)
    os.remove(f"{path}.index")
    storage = FileStorage(path)
    assert storage.lastTransaction() == first
    second = commit(storage, store(z64, first))
    # not "zzzzzzzz" and one more
    assert first < second < p64(u64(first) + (10 << 32))
    storage.close()


def test_stop_with_an_index(storage, path):
    tids = [commit(storage, store(p64(n), z64)) for n in range(4)]
    storage.close()
    assert Path(f"{path}.index").exists()
    past = FileStorage(path, read_only=True, stop=tids[2])
    assert past.lastTransaction() == tids[1] and len(past) == 2
    with pytest.raises(POSKeyError):
        past.load(p64(2))
    past.close()


def test_blobs_beside_a_missing_data_file(storage, path, tmp_path):
    (tmp_path / "upload").write_text("content")
    tid = commit(storage, store(z64, z64), ("storeBlob", p64(1), z64, BLOB, str(tmp_path / "upload"), ""))
    blob = storage.loadBlob(p64(1), tid)
    storage.close()
    content = path.read_bytes()
    os.remove(path)
    with pytest.raises(Exception, match="restore the data file, or open with create=True"):
        FileStorage(path, blob_dir=tmp_path / "blobs")
    assert not path.exists() and Path(blob).read_text() == "content"
    path.write_bytes(content)
    FileStorage(path, blob_dir=tmp_path / "blobs").close()
    assert Path(blob).exists()
    FileStorage(path, blob_dir=tmp_path / "blobs", create=True).close()
    assert not Path(blob).exists()


def blob_files(path):
    return [name for _, _, names in os.walk(path.with_name("blobs")) for name in names if name != ".layout"]


@pytest.mark.parametrize("when", ["before the vote", "after the vote", "the vote fails", "the store fails", "the callback fails"])
def test_an_abort_leaves_no_blob_file(storage, path, tmp_path, when):
    tid = commit(storage, store(z64, z64))
    t = TransactionMetaData()
    storage.tpc_begin(t)
    for n in range(1, 4):
        (tmp_path / f"upload{n}").write_text("content")
        storage.storeBlob(p64(n), z64, BLOB, str(tmp_path / f"upload{n}"), "", t)
    if when == "the store fails":
        (tmp_path / "upload").write_text("content")
        with pytest.raises(Exception, match="conflict"):
            storage.storeBlob(z64, p64(5), BLOB, str(tmp_path / "upload"), "", t)
        os.remove(tmp_path / "upload")  # the caller's still
    elif when == "the vote fails":
        # the second blob's file is taken away
        staged = sorted((tmp_path / "blobs" / "tmp").iterdir(), key=lambda p: p.stat().st_mtime_ns)
        os.remove(staged[1])
        with pytest.raises(OSError):
            storage.tpc_vote(t)
    elif when != "before the vote":
        storage.tpc_vote(t)
    if when == "the callback fails":
        with pytest.raises(ZeroDivisionError):
            storage.tpc_finish(t, lambda tid: 1 / 0)
    storage.tpc_abort(t)
    assert blob_files(path) == []
    assert commit(storage, store(z64, tid)) > tid


def test_metadata_that_are_too_long_leave_no_lock(storage):
    with pytest.raises(Exception, match="too long"):
        storage.tpc_begin(TransactionMetaData(user="x" * 70_000))
    assert storage.tpc_transaction() is None
    commit(storage, store(z64, z64))  # ZODB waits for ever


def test_a_callback_may_load(storage):
    first = commit(storage, store(z64, z64))
    t = TransactionMetaData()
    storage.tpc_begin(t)
    storage.store(z64, first, DATA + b"2", "", t)
    storage.tpc_vote(t)
    seen = []
    storage.tpc_finish(t, lambda tid: seen.append(storage.loadBefore(z64, b"\x7f" + b"\xff" * 7)))
    assert seen == [(DATA, first, None)]


def test_finish_without_vote(storage, path):
    commit(storage, store(z64, z64))
    before = path.read_bytes()
    t = TransactionMetaData()
    storage.tpc_begin(t)
    with pytest.raises(Exception, match="without a successful tpc_vote"):
        storage.tpc_finish(t)
    assert path.read_bytes() == before


def test_oids_are_not_given_again(path):
    given = set()
    for _ in range(3):
        storage = FileStorage(path)
        oids = {storage.new_oid() for _ in range(100)}
        assert not oids & given
        given |= oids
        storage.close()


def test_a_hint_to_an_unknown_transaction(storage):
    commit(storage, store(z64, z64))
    tid = p64(u64(storage.lastTransaction()) + 5)
    commit(storage, ("restore", z64, tid, DATA, "", b"\1" * 8), tid=tid)
    assert storage.load(z64) == (DATA, tid)


def test_iterating_from_a_start_on_a_growing_or_damaged_tail(storage, path):
    tids = [commit(storage, store(p64(n), z64)) for n in range(4)]
    t = TransactionMetaData()
    storage.tpc_begin(t)
    storage.store(z64, tids[0], DATA * 1000, "", t)
    storage.tpc_vote(t)
    assert [transaction.tid for transaction in storage.iterator(tids[2])] == tids[2:]
    storage.tpc_abort(t)
    storage.close()
    with open(path, "ab") as file:
        file.write(b"\0\0\0\1" * 20)
    storage = FileStorage(path, read_only=True)
    assert [transaction.tid for transaction in storage.iterator(tids[2])] == tids[2:]
    storage.close()


def test_status_u(tmp_path):
    path = fixture("status_u_middle", tmp_path)
    Path(f"{path}.index").unlink(missing_ok=True)  # ZODB's own counts them
    storage = FileStorage(path)
    assert [t.status for t in storage.iterator()].count("u") == 0
    before = {oid: storage.load(oid) for oid in storage._index}
    undone = sum(1 for _ in storage.iterator())
    storage.pack(10**10, referencesf, gc=False)
    assert {oid: storage.load(oid)[0] for oid in storage._index} == {oid: data for oid, (data, _) in before.items()}
    assert sum(1 for _ in storage.iterator()) <= undone
    storage.close()


def test_a_transaction_begun_with_status_u_never_counts(storage, path):
    tid = commit(storage, store(z64, z64))
    commit(storage, store(z64, tid, DATA + b"2"), status="u")
    assert storage.load(z64) == (DATA, tid)
    storage.close()
    storage = FileStorage(path)
    assert storage.load(z64) == (DATA, tid)
    storage.close()


def test_an_index_over_transactions_without_records(path):
    storage = FileStorage(path)
    for _ in range(5):
        commit(storage)
    last = storage.lastTransaction()
    storage.close()
    ZODB.fsIndex.fsIndex().save(path.stat().st_size, f"{path}.index")
    storage = FileStorage(path)
    assert storage.lastTransaction() == last and len(storage) == 0
    storage.close()


def test_record_iternext_goes_on_after_a_deletion(storage):
    tids = [commit(storage, store(p64(n), z64)) for n in range(4)]
    commit(storage, ("deleteObject", p64(1), tids[1]))
    found, oid = [], None
    while True:
        oid, _, _, following = storage.record_iternext(oid)
        found.append(oid)
        if following is None:
            break
        oid = following
    assert found == [p64(0), p64(2), p64(3)]


HOLDER = """
import sys, zeo_rs
storage = zeo_rs.FileStorage(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("deleted", [False, True], ids=["with lock file", "lock file deleted"])
def test_a_second_process_is_told_who_has_it(path, deleted):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "open\n"
        if deleted:
            os.remove(f"{path}.lock")
        for options in {}, {"create": True}:
            with pytest.raises(LockError, match=f"in use by process {holder.pid}"):
                FileStorage(path, **options)
        FileStorage(path, read_only=True).close()
        holder.stdin.close()
    storage = FileStorage(path)
    if not deleted:
        with pytest.raises(LockError):  # ZODB keeps out, too
            ZODB.FileStorage.FileStorage(str(path))
    storage.close()


def test_a_read_only_storage_keeps_its_file(storage, path):
    tid = z64
    for n in range(20):
        tid = commit(storage, store(z64, tid, DATA + b"%d" % n), store(p64(n + 1), z64, DATA))
    reader = FileStorage(path, read_only=True)
    before = [reader.load(oid) for oid in reader._index]
    storage.pack(10**10, referencesf)
    assert len(storage) == 1
    assert [reader.load(oid) for oid in reader._index] == before and len(before) == 21
    assert sum(1 for _ in reader.iterator()) == 20
    reader.close()


def test_a_pack_during_the_log_of_undoable_transactions(storage):
    tid = z64
    for n in range(50):
        tid = commit(storage, store(z64, tid, DATA + b"%d" % n))
    packed = threading.Event()

    def accept(entry):
        if not packed.is_set():
            packed.set()
            thread = threading.Thread(target=storage.pack, args=(10**10, referencesf))
            thread.start()
            thread.join(30)
        return True

    assert len(storage.undoLog(0, 45, accept)) == 45
    assert packed.is_set() and storage.undoLog(0, 45) == []
