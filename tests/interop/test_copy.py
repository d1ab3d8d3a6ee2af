"""``zeo-rs copy``, ``copyTransactionsFrom`` and ZODB's own copying, between files and servers of both kinds."""

import contextlib
import io
import os
import pty
import shutil
import subprocess
import sys
import termios
import threading

import pytest
import transaction
import ZODB
import ZODB.blob
import ZODB.FileStorage
from BTrees.OOBTree import OOBTree
from peers import KINDS, Server

from zeo_rs.clientstorage import ClientStorage
from zeo_rs.filestorage import FileStorage


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A Data.fs with blobs, an undo, conflicts of metadata; and what a copy must hold."""
    directory = tmp_path_factory.mktemp("original")
    path, blobs = str(directory / "Data.fs"), str(directory / "blobs")
    with contextlib.closing(ZODB.DB(ZODB.FileStorage.FileStorage(path, blob_dir=blobs))) as db:
        manager = transaction.TransactionManager()
        connection = db.open(manager)
        root = connection.root()
        root["tree"] = OOBTree({n: "x" * n for n in range(200)})
        manager.commit()
        for n in range(3):
            root["blob"] = blob = root.get("blob") or ZODB.blob.Blob()
            with blob.open("w") as file:
                file.write(b"blob %d" % n * 50_000)
            manager.get().note(f"blob {n}")
            manager.get().setUser("someone")
            manager.get().setExtendedInfo("n", n)
            manager.commit()
        root["tree"][1000] = "undone"
        manager.commit()
        db.undo(db.undoInfo(0, 1)[0]["id"], manager.get())
        manager.commit()
        connection.close()
    return path, blobs


def history(storage):
    """Everything that a copy keeps."""
    seen = []
    for txn in storage.iterator():
        records = []
        for record in txn:
            content = None
            if record.data and ZODB.blob.is_blob_record(record.data):
                with storage.openCommittedBlobFile(record.oid, record.tid) as file:
                    content = file.read()
            records.append((record.oid, record.tid, record.data, content))
        # ZEO's server writes the record of a blob twice
        records = sorted(set(records), key=lambda record: record[:2])
        seen.append((txn.tid, txn.status, txn.user, txn.description, txn.extension, records))
    return seen


@pytest.fixture(scope="module")
def expected(original):
    path, blobs = original
    with contextlib.closing(ZODB.FileStorage.FileStorage(path, blob_dir=blobs, read_only=True)) as storage:
        seen = history(storage)
    assert len(seen) >= 7 and any(content for *_, records in seen for *_, content in records)
    return seen


def uri(server):
    return "zeo://%s:%s?wait_timeout=30" % server.address


def run(*args):
    done = subprocess.run(
        [sys.executable, "-m", "zeo_rs.cli", "copy", *map(str, args)], capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_to_a_server_and_back(kind, original, expected, tmp_path):
    path, blobs = original
    with Server(kind) as server:
        status, out, err = run(
            path, uri(server), "--source-blobs", blobs, "--destination-blobs", tmp_path / "cache-there"
        )
        assert status == 0, err
        assert out.startswith(f"{len(expected)} transactions") and " 3 blobs" in out
        with contextlib.closing(ClientStorage(server.address, blob_dir=str(tmp_path / "look"))) as storage:
            assert history(storage) == expected
        back = tmp_path / "back.fs"
        status, out, err = run(
            uri(server), back, "--source-blobs", tmp_path / "cache-back", "--destination-blobs", tmp_path / "blobs"
        )
        assert status == 0, err
        server.kill()
    for kind in (ZODB.FileStorage.FileStorage, FileStorage):
        with contextlib.closing(kind(str(back), blob_dir=str(tmp_path / "blobs"))) as storage:
            assert history(storage) == expected


def test_incremental(original, expected, tmp_path):
    path, blobs = original
    source, copy = str(tmp_path / "source.fs"), str(tmp_path / "copy.fs")
    shutil.copy(path, source)
    shutil.copytree(blobs, tmp_path / "blobs")
    arguments = (source, copy, "--source-blobs", tmp_path / "blobs", "--destination-blobs", tmp_path / "blobs-copy")
    assert run(*arguments)[0] == 0
    status, _, err = run(*arguments)
    assert status == 2 and "--incremental" in err
    status, out, _ = run(*arguments, "--incremental")
    assert status == 0 and out.startswith("0 transactions")
    with contextlib.closing(ZODB.DB(FileStorage(source, blob_dir=str(tmp_path / "blobs")))) as db:
        with db.transaction() as connection:
            connection.root()["blob"] = ZODB.blob.Blob(b"more")
    status, out, _ = run(*arguments, "--incremental")
    assert status == 0 and out.startswith("1 transactions") and " 1 blobs" in out
    histories = []
    for path, blobs in ((source, "blobs"), (copy, "blobs-copy")):
        with contextlib.closing(FileStorage(path, blob_dir=str(tmp_path / blobs))) as storage:
            histories.append(history(storage))
    assert histories[0] == histories[1] and histories[0][: len(expected)] == expected
    # one that has gone on by itself is no copy any more
    with contextlib.closing(ZODB.DB(FileStorage(copy))) as db, db.transaction() as connection:
        connection.root()["own"] = 1
    status, _, err = run(*arguments, "--incremental")
    assert status == 2 and "newer than the source" in err


def test_an_interrupted_copy_is_whole_and_can_be_gone_on_with(original, expected, tmp_path):
    from zeo_rs.copying import copy

    path, blobs = original

    target = tmp_path / "copy.fs", str(tmp_path / "blobs")
    with contextlib.closing(FileStorage(path, blob_dir=blobs, read_only=True)) as source:
        with contextlib.closing(FileStorage(str(target[0]), blob_dir=target[1])) as destination:
            calls = []

            def count(done):
                calls.append(done.records)
                if done.transactions == 3:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                copy(source, destination, progress=count)
            assert history(destination) == expected[:3] and calls
    status, out, err = run(path, *target[:1], "--source-blobs", blobs, "--destination-blobs", target[1], "-i")
    assert status == 0, err
    with contextlib.closing(FileStorage(str(target[0]), blob_dir=target[1])) as destination:
        assert history(destination) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_zodbs_own_copying_into_a_client(kind, original, expected, tmp_path):
    path, blobs = original
    with Server(kind) as server:
        with contextlib.closing(ClientStorage(server.address, blob_dir=str(tmp_path / "cache"))) as storage:
            with contextlib.closing(ZODB.FileStorage.FileStorage(path, blob_dir=blobs, read_only=True)) as source:
                ZODB.blob.copyTransactionsFromTo(source, storage)
            assert history(storage) == expected
        server.kill()


def test_bad_arguments(tmp_path):
    assert run(tmp_path / "missing.fs", tmp_path / "copy.fs")[0] == 2
    assert run("zeo://", tmp_path / "copy.fs")[0] == 2
    assert not os.path.exists(tmp_path / "copy.fs")
    status, _, err = run("zeo://127.0.0.1:1?wait_timeout=1", tmp_path / "copy.fs")
    assert status == 1 and "127.0.0.1" in err


def test_a_terminal_sees_a_bar(original, tmp_path):
    path, blobs = original
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "zeo_rs.cli", "copy", path, str(tmp_path / "copy.fs")),
            *("--source-blobs", blobs, "--destination-blobs", str(tmp_path / "blobs")),
        ],
        stderr=theirs,
        stdout=subprocess.DEVNULL,
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert process.wait(60) == 0
    assert b"copying" in seen and b"B/s" in seen
    # blobs come on top of what the source's size says: no total, and no share of it
    assert b"%|" not in seen


def test_a_bar_moves_while_a_blob_is_on_its_way(monkeypatch):
    """What is sent counts as it goes, what is received is told; nothing goes back, and there is no total to be wrong."""
    from zeo_rs.cli import progress
    from zeo_rs.copying import Progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    class Client:
        transfers = []

        def blob_stats(self):
            looked.release()
            return {"transfers": self.transfers}

    looked = threading.Semaphore(0)
    monkeypatch.setattr(progress, "LOOK_EVERY", 0.001)
    monkeypatch.setattr(sys, "stderr", Terminal())
    client, done = Client(), Progress()

    def seen(transfers):
        client.transfers = transfers
        while looked.acquire(blocking=False):
            pass  # looks from before
        for _ in range(3):  # the first may have been under way, the third begins when the second is shown
            assert looked.acquire(timeout=60)
        return bar._bar.n, bar._bar.postfix

    with progress.Bar("copying", None, watch=[client, object()]) as bar:
        done.bytes, done.transactions = 100, 1
        bar.copied(done)
        down = {"direction": "down", "bytes_done": 5_000_000}
        assert seen([down]) == (100, "1 transactions, 0 blobs, 5.00MB of a blob received")
        up = {"direction": "up", "bytes_done": 700}
        assert seen([up])[0] == 800
        assert seen([{**up, "bytes_done": 1000}])[0] == 1100
        assert seen([])[0] == 1100
        done.bytes = 1100
        bar.copied(done)
        assert bar._bar.n == 1100 and bar._bar.total is None


def test_the_file_of_a_large_blob_is_told_of_in_pieces(tmp_path):
    from zeo_rs.copying import CHUNK, copy

    source, target = (FileStorage(str(tmp_path / f"{name}.fs"), blob_dir=str(tmp_path / name)) for name in ("a", "b"))
    with contextlib.closing(ZODB.DB(source)) as db, contextlib.closing(target):
        with db.transaction() as connection:
            connection.root()["large"] = ZODB.blob.Blob(bytes(3 * CHUNK))
        told = []
        done = copy(source, target, progress=lambda done: told.append(done.bytes + done.blob_bytes))
        assert told == sorted(told) and len({bytes // CHUNK for bytes in told}) == 4
        assert done.bytes == told[-1] and done.blobs == 1
