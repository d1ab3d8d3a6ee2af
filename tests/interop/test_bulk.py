"""Large transactions and large blobs, seen from outside: what they take in memory, and what they leave behind."""

import os
import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest
from peers import Server
from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64

import zeo_rs

MB = 1 << 20
RECORD = b"\x80\x03cZODB.blob\nBlob\nq\x01.\x80\x03N."


def memory(pid="self"):
    """(resident now, resident at most) in bytes."""
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def peak(pid="self"):
    """Resident at most, in bytes: from now on, where the kernel can forget what other tests took before."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")
    return memory(pid)[1]


class Proxy:
    """Between a client and a server; passes on nothing from the client while `may_pass` is not set."""

    def __init__(self, address):
        self.target = address
        self.may_pass = threading.Event()
        self.may_pass.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            threading.Thread(target=self._pass, args=(client, server, self.may_pass), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, None), daemon=True).start()

    @staticmethod
    def _pass(source, target, gate):
        try:
            while data := source.recv(65536):
                if gate is not None:
                    gate.wait(30)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.listener.close()


@pytest.fixture
def server():
    with Server("rust", options="staging-memory 8MB") as server:
        yield server


def test_a_large_transaction_takes_little_memory_in_the_server(server):
    storage = zeo_rs.ClientStorage(server.address, wait_timeout=30, cache_size=MB)
    try:
        oids = [storage.new_oid() for _ in range(2_000)]
        data = os.urandom(100_000)
        before = peak(server.process.pid)
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


def write(path, size, seed=b"blob"):
    """A file whose blocks differ from each other."""
    with open(path, "wb") as file:
        for number in range(size // MB):
            file.write((b"%s%08d" % (seed, number)).ljust(MB, b"x"))


def same(one, other):
    with open(one, "rb") as a, open(other, "rb") as b:
        while True:
            x, y = a.read(MB), b.read(MB)
            if x != y:
                return False
            if not x:
                return True


def commit_blob(storage, path):
    oid, transaction = storage.new_oid(), TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.storeBlob(oid, z64, RECORD, str(path), "", transaction)
    storage.tpc_vote(transaction)
    return oid, storage.tpc_finish(transaction)


@pytest.mark.parametrize("encoding", ["M5", "Z5"])
def test_blobs_go_up_and_down_in_constant_memory(encoding, tmp_path):
    size = 160 * MB
    with Server("rust", encoding) as server:
        write(tmp_path / "original", size)
        write(tmp_path / "upload", size)
        storage = zeo_rs.ClientStorage(server.address, wait_timeout=30, blob_dir=str(tmp_path / "up"))
        other = zeo_rs.ClientStorage(server.address, wait_timeout=30, blob_dir=str(tmp_path / "down"))
        try:
            small = tmp_path / "small"
            small.write_bytes(b"small")
            commit_blob(storage, small)
            before, server_before = peak(), peak(server.process.pid)
            oid, tid = commit_blob(storage, tmp_path / "upload")
            path = other.loadBlob(oid, tid)
            growth = [memory()[1] - before, memory(server.process.pid)[1] - server_before]
            assert same(path, tmp_path / "original") and same(storage.loadBlob(oid, tid), tmp_path / "original")
            assert storage.blob_stats() == {"uploaded": size + 5, "downloaded": 0, "transfers": []}
            assert other.blob_stats() == {"uploaded": 0, "downloaded": size, "transfers": []}
        finally:
            storage.close()
            other.close()
    assert max(growth) < 64 * MB, f"{[round(bytes / MB) for bytes in growth]} MB for a blob of 160 MB"


def test_progress_is_seen_while_a_blob_is_on_its_way(tmp_path):
    """On the client, through a proxy that does not read on until it has been seen."""
    size = 64 * MB
    with Server("rust") as server, Proxy(server.address) as proxy:
        write(tmp_path / "upload", size)
        storage = zeo_rs.ClientStorage(proxy.address, wait_timeout=30, blob_dir=str(tmp_path / "up"))
        try:
            storage.new_oid()  # a stock of them, so that nothing has to be asked
            proxy.may_pass.clear()
            thread = threading.Thread(target=commit_blob, args=(storage, tmp_path / "upload"))
            thread.start()
            deadline = time.monotonic() + 30
            while not storage.blob_stats()["transfers"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            (transfer,) = storage.blob_stats()["transfers"]
            assert transfer["direction"] == "up" and transfer["bytes_total"] == size
            assert transfer["bytes_done"] < size
            proxy.may_pass.set()
            thread.join(60)
            assert storage.blob_stats() == {"uploaded": size, "downloaded": 0, "transfers": []}
            assert storage.server_status()["blob_bytes_received"] == size
        finally:
            proxy.may_pass.set()
            storage.close()


def test_processes_that_want_the_same_blob_download_it_once(server, tmp_path):
    write(tmp_path / "original", 20 * MB)
    write(tmp_path / "upload", 20 * MB)
    storage = zeo_rs.ClientStorage(server.address, wait_timeout=30, blob_dir=str(tmp_path / "own"))
    try:
        oid, tid = commit_blob(storage, tmp_path / "upload")
        program = (
            "import sys, zeo_rs\n"
            "storage = zeo_rs.ClientStorage(('127.0.0.1', int(sys.argv[1])), wait_timeout=30, blob_dir=sys.argv[2])\n"
            "print(flush=True)\n"
            "sys.stdin.readline()\n"
            "print(storage.loadBlob(bytes.fromhex(sys.argv[3]), bytes.fromhex(sys.argv[4])), flush=True)\n"
            "print(storage.blob_stats()['downloaded'], flush=True)\n"
            "storage.close()\n"
        )
        arguments = [str(server.address[1]), str(tmp_path / "shared"), oid.hex(), tid.hex()]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]
        for process in processes:
            process.stdout.readline()
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=60)[0].split() for process in processes]
        assert len({path for path, _ in answers}) == 1 and same(answers[0][0], tmp_path / "original")
        assert sorted(int(downloaded) for _, downloaded in answers) == [0, 0, 0, 20 * MB]
        assert storage.server_status()["blob_bytes_sent"] == 20 * MB
    finally:
        storage.close()


def test_blobs_that_threads_download_side_by_side_are_kept_apart(server, tmp_path):
    storage = zeo_rs.ClientStorage(server.address, wait_timeout=30, blob_dir=str(tmp_path / "own"))
    other = zeo_rs.ClientStorage(server.address, wait_timeout=30, blob_dir=str(tmp_path / "other"))
    try:
        blobs = []
        for number in range(6):
            for name in (f"original{number}", "upload"):
                write(tmp_path / name, (number + 1) * MB, b"%d-" % number)
            blobs.append((*commit_blob(storage, tmp_path / "upload"), tmp_path / f"original{number}"))
        results = []

        def download(oid, tid, original):
            results.append(same(other.loadBlob(oid, tid), original))

        threads = [threading.Thread(target=download, args=blob) for blob in blobs * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == [True] * 12
        assert other.blob_stats()["downloaded"] == 21 * MB
    finally:
        storage.close()
        other.close()
