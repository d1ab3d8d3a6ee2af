"""Tids that do not ascend: whoever commits may give them, as ZODB allows. Nothing may be lost for it."""

import base64
import os

import pytest
import ZODB.FileStorage
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import UndoError
from ZODB.serialize import referencesf
from ZODB.TimeStamp import TimeStamp
from ZODB.utils import p64, u64, z64

from zeo_rs import FileStorage

BASE = 0x03F58E0000000000
DATA = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03}q\x01."
#: In file order; of two, the later is smaller than one long before it.
NUMBERS = [*range(1, 21), 5.5, 21, 22, 0.5, 30]


def tid(number):
    return p64(BASE + int(number * 0x100000000))


def number(tid):
    return (u64(tid) - BASE) / 0x100000000


def oid(number):
    return p64(int(number * 10))


def fill(storage, numbers=NUMBERS):
    for n in numbers:
        t = TransactionMetaData()
        storage.tpc_begin(t, tid(n))
        storage.store(oid(n), z64, DATA, "", t)
        storage.tpc_vote(t)
        storage.tpc_finish(t)


@pytest.fixture(params=["live", "index", "index of the half", "scanned", "packed"])
def storage(request, tmp_path):
    """A storage that knows its transactions in one of the ways there are."""
    path = str(tmp_path / "Data.fs")
    storage = FileStorage(path)
    if request.param == "index of the half":
        fill(storage, NUMBERS[:22])
        storage.close()
        saved = (tmp_path / "Data.fs.index").read_bytes()
        storage = FileStorage(path)
        fill(storage, NUMBERS[22:])
        storage.close()
        (tmp_path / "Data.fs.index").write_bytes(saved)
        storage = FileStorage(path)
    elif request.param != "live":
        fill(storage)
        storage.close()
        if request.param != "index":
            os.unlink(path + ".index")
        storage = FileStorage(path)
        if request.param == "packed":
            storage.pack(TimeStamp(tid(1)).timeTime(), referencesf, gc=False)
    else:
        fill(storage)
    yield storage
    storage.close()


@pytest.mark.parametrize("start", [0.5, 1, 3, 5.2, 5.5, 5.7, 10, 20, 21.5, 25, 30, 31])
def test_an_iteration_begins_with_the_first_that_is_not_before_its_start(storage, start):
    found = [number(t.tid) for t in storage.iterator(tid(start))]
    after = [n for n in NUMBERS if n >= start]
    expected = NUMBERS[NUMBERS.index(after[0]) :] if after else []
    assert found == expected
    assert set(after) <= set(found)


def test_every_transaction_is_found_by_its_tid(storage):
    entries = storage.undoLog(0, 100)
    assert len(entries) >= len(NUMBERS) - 1
    for entry in entries:
        t = TransactionMetaData()
        storage.tpc_begin(t)
        undone = base64.decodebytes(entry["id"] + b"\n")
        assert list(storage.undo(entry["id"], t)[1]) == [oid(number(undone))]
        storage.tpc_abort(t)
    t = TransactionMetaData()
    storage.tpc_begin(t)
    with pytest.raises(UndoError, match="Invalid transaction id"):
        storage.undo(base64.encodebytes(tid(5.6)), t)
    storage.tpc_abort(t)


def test_a_hint_of_restore_is_found(storage):
    t = TransactionMetaData()
    storage.tpc_begin(t, tid(40))
    for n in NUMBERS:
        storage.restore(oid(n), tid(40), DATA, "", tid(n), t)
    storage.tpc_vote(t)
    storage.tpc_finish(t)
    (last,) = storage.iterator(tid(40))
    assert [r.data_txn for r in last] == [tid(n) for n in NUMBERS]


def test_records_are_given_as_often_as_one_likes(storage):
    transactions = list(storage.iterator())
    for _ in range(3):
        assert [[r.oid for r in t] for t in transactions] == [[oid(n)] for n in NUMBERS]


def test_records_stay_when_the_storage_is_packed_or_closed(tmp_path):
    path = str(tmp_path / "Data.fs")
    storage = FileStorage(path)
    last = z64
    for n in range(5):
        t = TransactionMetaData()
        storage.tpc_begin(t)
        storage.store(z64, last, DATA, "", t)
        storage.tpc_vote(t)
        last = storage.tpc_finish(t)
    transactions = list(storage.iterator())
    for _ in range(2):
        assert [len(list(t)) for t in transactions] == [1] * 5
        storage.pack(TimeStamp(last).timeTime() + 1, referencesf)
    storage.close()
    assert [len(list(t)) for t in transactions] == [1] * 5


def test_zodb_reads_the_same(tmp_path):
    path = str(tmp_path / "Data.fs")
    storage = FileStorage(path)
    fill(storage)
    storage.close()
    storage = ZODB.FileStorage.FileStorage(path)
    assert [number(t.tid) for t in storage.iterator()] == NUMBERS
    assert len(storage.undoLog(0, 100)) == len(NUMBERS)
    storage.close()
