"""`kill -9` in the middle of commits, again and again on one file; a disk that is full."""

import errno
import signal
import subprocess
import sys

import pytest
import ZODB.FileStorage
import zeo_rs
from ZODB.Connection import TransactionMetaData
from ZODB.scripts import fstest
from ZODB.serialize import referencesf
from ZODB.utils import maxtid, p64, z64

# Commits without end, of several objects of up to some 100 kB; says what was acknowledged.
CHILD = """
import sys, zeo_rs
from ZODB.Connection import TransactionMetaData
storage = zeo_rs.FileStorage(sys.argv[1])
serial = {}
n = 0
while True:
    n += 1
    txn = TransactionMetaData(description=b"n%d" % n)
    storage.tpc_begin(txn)
    oids = [storage.new_oid() for _ in range(n % 3)] + list(serial)[: n % 5]
    for oid in oids:
        storage.store(oid, serial.get(oid, b"\\0" * 8), oid * (1 + (n * 977) % 9000), "", txn)
    storage.tpc_vote(txn)
    tid = storage.tpc_finish(txn)
    serial.update(dict.fromkeys(oids, tid))
    if n % 7 == 0:
        storage._save_index()
    print(tid.hex(), *(oid.hex() for oid in oids), flush=True)
"""


@pytest.mark.timeout(180)
def test_what_was_acknowledged_survives_kill_9(tmp_path):
    path = tmp_path / "Data.fs"
    acknowledged, owners = [], {}
    for life, kill_after in enumerate([1, 7, 30, 55, 90]):
        with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True) as child:
            lines = [child.stdout.readline() for _ in range(kill_after)]
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
        # The last line may have been cut off by the kill.
        for line in lines:
            if line.endswith("\n"):
                tid, *oids = line.split()
                acknowledged.append((tid, oids))
                for oid in oids:
                    assert owners.setdefault(oid, life) == life, "an oid was given to two processes"
        for storage_class in (zeo_rs.FileStorage, ZODB.FileStorage.FileStorage):
            storage = storage_class(str(path))
            found = {txn.tid.hex(): {r.oid.hex() for r in txn} for txn in storage.iterator()}
            for tid, oids in acknowledged:
                assert found[tid] == set(oids)
            # At most one transaction was committed and not heard of, in each life.
            assert len(found) <= len(acknowledged) + life + 1
            for oid in {oid for _, oids in acknowledged for oid in oids}:
                data, tid, end = storage.loadBefore(p64(int(oid, 16)), maxtid)
                assert set(data) == set(bytes.fromhex(oid)) and end is None
            storage.close()
        fstest.check(str(path))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_an_error_of_the_vote(small_disk):
    path = small_disk / "Data.fs"
    storage = zeo_rs.FileStorage(path, blob_dir=small_disk / "blobs")
    tids = []

    def commit(oid, size, blob=None, serial=z64):
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        try:
            if blob is None:
                storage.store(oid, serial, b"x" * size, "", txn)
            else:
                storage.storeBlob(oid, z64, b"x" * size, blob, "", txn)
            storage.tpc_vote(txn)
        except BaseException:
            storage.tpc_abort(txn)
            raise
        tids.append(storage.tpc_finish(txn))

    changed = storage.new_oid()
    commit(changed, 1000)
    commit(changed, 1000, serial=tids[0])  # so that there is something for a pack to drop
    with pytest.raises(OSError, match="no space") as error:
        while True:
            commit(storage.new_oid(), 50_000)
    assert error.value.errno == errno.ENOSPC
    assert len(tids) > 10 and storage.lastTransaction() == tids[-1]
    # it goes on: what is smaller has room, loads work, a blob that has none leaves nothing
    commit(storage.new_oid(), 10)
    upload = small_disk.parent / "upload"
    upload.write_bytes(b"x" * 500_000)
    with pytest.raises(OSError) as error:
        commit(storage.new_oid(), 10, str(upload))
    assert error.value.errno == errno.ENOSPC
    assert [p for p in (small_disk / "blobs").rglob("*") if p.is_file()] == [small_disk / "blobs" / ".layout"]
    assert len(storage) == len(tids) - 1
    # so does a pack
    with pytest.raises(OSError, match="the storage is as it was") as error:
        storage.pack(10**10, referencesf, gc=False)
    assert error.value.errno == errno.ENOSPC
    assert not (small_disk / "Data.fs.pack").exists()
    # no room for the index: closing is not stopped by it, half an index does not stay
    storage.close()
    for storage_class in (zeo_rs.FileStorage, ZODB.FileStorage.FileStorage):
        storage = storage_class(str(path))
        assert [txn.tid for txn in storage.iterator()] == tids
        storage.close()
