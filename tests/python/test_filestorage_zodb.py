"""What ZODB's FileStorage answers to calls at the edges, asked of both."""

import errno
import os

import pytest
import ZODB.FileStorage
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError, ReadOnlyError, StorageTransactionError, UndoError
from ZODB.utils import p64, z64

from zeo_rs import FileStorage

DATA = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03}q\x01."
BLOB = b"\x80\x03cZODB.blob\nBlob\nq\x00.\x80\x03N."
CLASSES = [ZODB.FileStorage.FileStorage, FileStorage]


@pytest.fixture(params=CLASSES, ids=["ZODB", "zeo_rs"])
def storage(request, tmp_path):
    storage = request.param(str(tmp_path / "Data.fs"), blob_dir=str(tmp_path / "blobs"))
    storage.tids = []
    for number in range(3):
        t = TransactionMetaData()
        storage.tpc_begin(t)
        storage.store(z64, storage.tids[-1] if storage.tids else z64, DATA + b"x" * number, "", t)
        storage.tpc_vote(t)
        storage.tids.append(storage.tpc_finish(t))
    yield storage
    storage.close()


@pytest.fixture
def begun(storage):
    t = TransactionMetaData()
    storage.tpc_begin(t)
    yield t
    storage.tpc_abort(t)


@pytest.mark.parametrize("size", [-1, 0, 1, 2, 3, 4, 2**70, -(2**70)])
def test_counts_of_any_size(storage, size):
    some = max(0, min(size, 3))
    assert len(storage.history(z64, size)) == some
    assert len(storage.lastInvalidations(size)) == some
    if size >= 0:
        assert len(storage.undoLog(0, size)) == some
    else:
        assert len(storage.undoLog(0, size)) == min(-size, 3)
        assert len(storage.undoLog(size, 2)) == 2


def test_a_negative_first_is_the_first(storage):
    assert [e["id"] for e in storage.undoLog(-1, -2)] == [e["id"] for e in storage.undoLog(0, 1)]


def test_an_unknown_object_has_no_history_of_any_size(storage):
    for size in (-1, 0, 1):
        with pytest.raises(POSKeyError):
            storage.history(p64(99), size)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_data_are_what_is_like_bytes(storage, begun, make):
    storage.store(p64(1), z64, make(DATA), "", begun)
    storage.tpc_vote(begun)
    storage.tpc_finish(begun)
    assert storage.load(p64(1))[0] == DATA


def test_data_are_no_text(storage, begun):
    with pytest.raises(TypeError):
        storage.store(p64(1), z64, "text", "", begun)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, t: s.store(z64, z64, DATA, "", t),
        lambda s, t: s.undo(b"AAAAAAAAAAA=", t),
        lambda s, t: s.deleteObject(z64, z64, t),
        lambda s, t: s.restore(z64, z64, DATA, "", None, t),
        lambda s, t: s.checkCurrentSerialInTransaction(z64, z64, t),
    ],
)
def test_another_transaction_is_named(storage, begun, call):
    other = TransactionMetaData()
    with pytest.raises(StorageTransactionError) as raised:
        call(storage, other)
    assert raised.value.args == (storage, other)


def test_a_missing_blob_file_is_named(storage):
    with pytest.raises(POSKeyError) as raised:
        storage.loadBlob(z64, storage.tids[0])
    text, *rest = raised.value.args
    assert text == f"No blob file at {storage.fshelper.getBlobFilename(z64, storage.tids[0])}" and rest == [z64, storage.tids[0]]


def test_undo_errors(storage, begun):
    with pytest.raises(UndoError) as raised:
        storage.undo(b"AAAAAAAAAAA=", begun)
    assert raised.value.args == ("Invalid transaction id",)


def test_undo_answers_oids_as_a_set_does(storage, begun):
    newest = storage.undoLog(0, 1)[0]["id"]
    assert storage.undo(newest, begun)[1] & {z64, p64(1)} == {z64}


def test_the_largest_oid_is_one_that_was_issued(storage):
    given = [storage.new_oid() for _ in range(3)]
    assert storage._oid == given[-1]
    storage.set_max_oid(p64(1000))
    assert storage._oid == p64(1000)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_read_only_storage_without_blobs_says_so(tmp_path, cls):
    cls(str(tmp_path / "Data.fs")).close()
    storage = cls(str(tmp_path / "Data.fs"), read_only=True)
    with pytest.raises(ReadOnlyError):
        storage.storeBlob(z64, z64, BLOB, str(tmp_path / "none"), "", None)
    storage.close()


def test_an_error_of_opening_names_the_file_and_the_number_once(tmp_path):
    name = str(tmp_path / "none" / "Data.fs")
    with pytest.raises(FileNotFoundError) as raised:
        FileStorage(name)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, name)
    assert str(raised.value).lower().count("errno") == 1 and "os error" not in str(raised.value)
    assert str(raised.value).count("No such file") == 1


def test_what_a_killed_process_left_of_blobs_is_removed(tmp_path):
    arguments = str(tmp_path / "Data.fs"), {"blob_dir": str(tmp_path / "blobs")}
    FileStorage(arguments[0], **arguments[1]).close()
    for name in ("12-17e0-0.prepared", "0a1b2c.staged", "BUCupload"):
        (tmp_path / "blobs" / "tmp" / name).write_bytes(b"blob")
    # it may be somebody's who has the storage open
    reader = FileStorage(arguments[0], read_only=True, **arguments[1])
    assert len(os.listdir(reader.temporaryDirectory())) == 3
    reader.close()
    storage = FileStorage(arguments[0], **arguments[1])
    assert os.listdir(storage.temporaryDirectory()) == ["BUCupload"]
    storage.close()


LARGE = """
import os, resource, sys
from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64, z64
from zeo_rs import FileStorage
storage = FileStorage(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
t = TransactionMetaData()
storage.tpc_begin(t)
for number in range(200):
    storage.store(p64(number), z64, bytes([number]) * (1 << 20), "", t)
assert sorted(os.listdir(os.path.dirname(sys.argv[1]))) == ["D.fs", "D.fs.index", "D.fs.lock"]
storage.tpc_vote(t)
tid = storage.tpc_finish(t)
assert all(storage.load(p64(n)) == (bytes([n]) * (1 << 20), tid) for n in range(200))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
storage.close()
"""


def test_a_large_transaction_is_not_in_memory(tmp_path):
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path / "D.fs")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60, "of 200 MB"


def test_a_large_transaction_may_be_undone_restored_and_given_up(tmp_path):
    """Whatever it does after its records went to the file."""
    storage = FileStorage(str(tmp_path / "Data.fs"))
    big = [bytes([n]) * (1 << 20) for n in range(40)]

    def begin():
        t = TransactionMetaData()
        storage.tpc_begin(t)
        return t

    t = begin()
    for number, data in enumerate(big):
        storage.store(p64(number), z64, data, "", t)
    storage.tpc_abort(t)
    t = begin()
    for number, data in enumerate(big):
        storage.store(p64(number), z64, data, "", t)
        storage.store(p64(100 + number), z64, b"small", "", t)
    storage.tpc_vote(t)
    first = storage.tpc_finish(t)
    t = begin()
    for number, data in enumerate(big):
        storage.restore(p64(number), first, data[::-1] + b"x", "", None, t)
    # of an object that this transaction wrote, and whose data are in the file
    storage.store(p64(0), storage.getTid(p64(0)), b"last", "", t)
    storage.tpc_vote(t)
    storage.tpc_finish(t)
    assert storage.load(p64(0))[0] == b"last"
    assert storage.load(p64(39))[0] == big[39] + b"x"
    assert storage.load(p64(139))[0] == b"small"
    storage.close()
    storage = ZODB.FileStorage.FileStorage(str(tmp_path / "Data.fs"))
    assert storage.loadSerial(p64(7), first) == big[7] + b"x"
    storage.close()
