"""What went wrong with files in the field: each test is a story of docs/stories.md."""

import os
import shutil
import subprocess
import sys
import threading
import time
import warnings

import pytest
import ZODB.FileStorage
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError
from ZODB.scripts import repozo
from ZODB.serialize import referencesf
from ZODB.utils import p64, u64, z64

import zeo_rs
from zeo_rs import FileStorage

LENGTH = b"\x80\x03cBTrees.Length\nLength\n.\x80\x03K%c."
MAPPING = b"\x80\x03cpersistent.mapping\nPersistentMapping\n.\x80\x03}."


def commit(storage, *stores):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    try:
        for oid, serial, data in stores:
            storage.store(oid, serial, data, "", txn)
        storage.tpc_vote(txn)
    except BaseException:
        storage.tpc_abort(txn)
        raise
    return storage.tpc_finish(txn)


def history(path, count):
    """A file with `count` revisions of one object that resolves conflicts; returns its oid and the tids."""
    storage = FileStorage(str(path))
    oid, tids = storage.new_oid(), [z64]
    for number in range(count):
        tids.append(commit(storage, (oid, tids[-1], LENGTH % number)))
    storage.close()
    return oid, tids[1:]


def damage(path, tid):
    """Makes the data record of this transaction unreadable."""
    content = bytearray(path.read_bytes())
    at = content.index(tid)
    record = content.index(tid, at + 8)
    content[record - 8 : record + 8] = b"\xff" * 16
    path.write_bytes(content)


def break_transaction(path, tid):
    """Makes a scan stop at this transaction: its length at the end is not that at its beginning."""
    content = bytearray(path.read_bytes())
    at = content.index(tid)
    end = at + u64(bytes(content[at + 8 : at + 16]))
    content[end : end + 8] = b"\xff" * 8
    path.write_bytes(content)


def test_a_serial_that_never_was_is_not_looked_for_beyond_its_time(tmp_path):
    """The history of an object may have a million revisions: the search for one of them ends at the first older one."""
    path = tmp_path / "Data.fs"
    oid, tids = history(path, 20)
    # whoever goes on to the older revisions stumbles
    damage(path, tids[15])
    storage = FileStorage(str(path))
    never = p64(u64(tids[-1]) - 1)
    with pytest.raises(POSKeyError):
        storage.loadSerial(oid, never)
    with pytest.raises(ConflictError):
        commit(storage, (oid, never, LENGTH % 77))
    commit(storage, (oid, tids[-1], LENGTH % 78))
    with pytest.raises(Exception) as raised:
        storage.loadSerial(oid, tids[0])
    assert not isinstance(raised.value, POSKeyError), "the damage was in the way"
    storage.close()


def test_an_index_spares_the_scan_and_a_kill_costs_only_the_tail(tmp_path):
    path, index = tmp_path / "Data.fs", tmp_path / "Data.fs.index"
    oid, tids = history(path, 5)
    older = index.read_bytes()
    storage = FileStorage(str(path))
    later = commit(storage, (p64(99), z64, MAPPING))
    storage.close()
    newer = index.read_bytes()
    # a scan from the beginning would fail
    intact = path.read_bytes()
    break_transaction(path, tids[1])
    damaged = path.read_bytes()
    for saved in newer, older:
        index.write_bytes(saved)
        storage = FileStorage(str(path))
        assert storage.load(p64(99)) == (MAPPING, later) and storage.load(oid)[1] == tids[-1]
        assert storage.lastTransaction() == later
        storage.close()
        path.write_bytes(damaged)
    index.unlink()
    with pytest.raises(Exception):
        FileStorage(str(path)).close()
    # an index that knows more than the file is of no use, and neither is one that is damaged
    path.write_bytes(intact[: intact.index(later)])
    for saved in newer, newer[: len(newer) // 2], b"nonsense":
        index.write_bytes(saved)
        storage = FileStorage(str(path))
        assert storage.lastTransaction() == tids[-1] and storage.load(oid)[1] == tids[-1]
        with pytest.raises(POSKeyError):
            storage.load(p64(99))
        storage.close()


OPEN = "import sys, zeo_rs; zeo_rs.FileStorage(sys.argv[1]).close()"


def test_after_a_pack_writes_and_the_lock_are_those_of_the_new_file(tmp_path):
    path = tmp_path / "Data.fs"
    oid, tids = history(path, 10)
    storage = FileStorage(str(path))
    commit(storage, (z64, z64, b"\x80\x03cpersistent.mapping\nPersistentMapping\n.\x80\x03}U\x01x(U\x08%scA\nB\ntQs." % oid))
    inode = path.stat().st_ino
    storage.pack(time.time() + 1, referencesf)
    assert path.stat().st_ino != inode
    last = commit(storage, (oid, tids[-1], LENGTH % 50))
    os.remove(f"{path}.lock")
    second = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True, timeout=60)
    assert second.returncode != 0 and str(os.getpid()) in second.stderr
    reader = ZODB.FileStorage.FileStorage(str(path), read_only=True)
    assert reader.load(oid) == (LENGTH % 50, last)
    reader.close()
    storage.close()
    assert subprocess.run([sys.executable, "-c", OPEN, path], timeout=60).returncode == 0


def test_iteration_beside_commits_misses_nothing(tmp_path):
    storage = FileStorage(str(tmp_path / "Data.fs"))
    tids, stop = [], threading.Event()

    def write():
        serial = z64
        while not stop.is_set():
            serial = commit(storage, (p64(1), serial, os.urandom(500)))
            tids.append(serial)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(30):
            known = list(tids)
            found = []
            for txn in storage.iterator():
                found.append(txn.tid)
                assert [(record.oid, record.tid) for record in txn] == [(p64(1), txn.tid)]
            assert found[: len(known)] == known
            assert found == sorted(set(found))
    finally:
        stop.set()
        thread.join(60)
    assert [txn.tid for txn in storage.iterator()] == tids
    storage.close()


def test_backups_beside_commits_and_between_packs_are_whole(tmp_path):
    """Not beside the switch of a pack: repozo opens the file twice and expects the same one, whosever pack it is."""
    path, repository = tmp_path / "Data.fs", tmp_path / "backups"
    oid, tids = history(path, 5)
    storage = FileStorage(str(path))
    stop, errors, packing = threading.Event(), [], threading.Lock()

    def write_and_pack():
        try:
            serial, number = tids[-1], 0
            while not stop.is_set():
                number += 1
                serial = commit(storage, (oid, serial, LENGTH % (number % 250)))
                tids.append(serial)
                if number % 20 == 0 and packing.acquire(blocking=False):
                    try:
                        # without garbage collection: the object has no root
                        storage.pack(time.time(), referencesf, gc=False)
                    finally:
                        packing.release()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write_and_pack)
    thread.start()
    try:
        for number in range(10):
            before = tids[-1]
            shutil.rmtree(repository, ignore_errors=True)
            repository.mkdir()
            with packing:
                repozo.main(["-B", "-F", "-r", str(repository), "-f", str(path)])
            restored = tmp_path / f"restored-{number}.fs"
            repozo.main(["-R", "-r", str(repository), "-o", str(restored)])
            for storage_class in FileStorage, ZODB.FileStorage.FileStorage:
                copy = storage_class(str(restored))
                assert before <= copy.load(oid)[1] == copy.lastTransaction()
                copy.close()
    finally:
        stop.set()
        thread.join(60)
    assert not errors
    storage.close()


def test_a_persistent_that_loses_invalidations_is_told_of():
    """`persistent` up to 6.1.1 does not work with Python 3.14, whatever the storage."""
    for version, python, warned in [("6.1.1", (3, 14), True), ("6.1.1", (3, 13), False), ("6.2", (3, 14), False), ("5.9.1", (3, 14), True)]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zeo_rs._warn_of_persistent(version, python)
        assert [w.category for w in caught] == [RuntimeWarning] * warned
