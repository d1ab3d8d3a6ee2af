"""Large transactions and large blobs, seen from outside: what they take in memory, and what they leave behind."""

import os

import pytest
from peers import Server
from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64

import zeo_rs

MB = 1 << 20


def memory(pid="self"):
    """(resident now, resident at most) in bytes."""
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


@pytest.fixture
def server():
    with Server("rust", options="staging-memory 8MB") as server:
        yield server


def test_a_large_transaction_takes_little_memory_in_the_server(server):
    storage = zeo_rs.ClientStorage(server.address, wait_timeout=30, cache_size=MB)
    try:
        oids = [storage.new_oid() for _ in range(2_000)]
        data = os.urandom(100_000)
        before = memory(server.process.pid)[0]
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for number, oid in enumerate(oids):
            storage.store(oid, z64, b"%08d" % number + data, "", transaction)
        storage.tpc_vote(transaction)
        storage.tpc_finish(transaction)
        growth = memory(server.process.pid)[1] - before
        for number in (0, 1_000, 1_999):
            assert storage.load(oids[number])[0] == b"%08d" % number + data
        assert not [name for name in os.listdir(server.directory) if name.startswith(".")]
    finally:
        storage.close()
    assert growth < 80 * MB, f"{growth / MB:.0f} MB for 200 MB of records"
