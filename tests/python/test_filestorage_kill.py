"""`kill -9` in the middle of commits, again and again on one file."""

import signal
import subprocess
import sys

import pytest
import ZODB.FileStorage
import zeo_rs
from ZODB.scripts import fstest
from ZODB.utils import maxtid, p64

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
