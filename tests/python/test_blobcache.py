"""The directory of downloaded blobs."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import zc.lockfile
import ZODB.blob
from ZODB.utils import p64

from zeo_rs import blobcache


def test_what_is_added_during_a_check_is_checked_after_it(tmp_path, monkeypatch):
    started, go_on, checks = threading.Semaphore(0), threading.Semaphore(0), []

    def check_size(directory, target, stopped):
        checks.append(target)
        started.release()
        assert go_on.acquire(timeout=30)

    monkeypatch.setattr(blobcache, "check_size", check_size)
    cache = blobcache.BlobCache(str(tmp_path / "blobs"), 1000, 10, "test")
    assert started.acquire(timeout=30)  # the check at the start
    cache._count(500)
    assert len(checks) == 1
    go_on.release()
    assert started.acquire(timeout=30), "nobody looked at the 500 bytes"
    checker = cache._checker
    go_on.release()
    checker.join(30)
    assert checks == [900, 900]
    cache._count(50)
    assert cache._checker is None
    cache._count(50)
    assert started.acquire(timeout=30), "no check after 10 % were added"
    go_on.release()


def test_what_is_open_is_not_evicted(tmp_path):
    directory = tmp_path / "7"
    directory.mkdir()
    for number in range(4):
        path = directory / f"{number}.0000000000000001.blob"
        path.write_bytes(bytes(1000))
        os.utime(path, (number, number))
    oldest, second, third, _ = sorted(directory.iterdir())
    with oldest.open("rb"):
        other = subprocess.Popen(
            [sys.executable, "-c", "import sys; f = open(sys.argv[1], 'rb'); print(flush=True); sys.stdin.read()", second],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with other:
            other.stdout.readline()
            blobcache.check_size(str(tmp_path), 3000)
            assert (oldest.exists(), second.exists(), third.exists()) == (True, True, False)
            other.stdin.close()
    blobcache.check_size(str(tmp_path), 1000)
    assert [path.exists() for path in (oldest, second)] == [False, False]


def test_a_forked_worker_looks_after_the_size_by_itself(tmp_path, monkeypatch):
    """Pre-fork: the parent's check may run at the fork, and its thread is not in the child."""
    started, go_on, checks = threading.Semaphore(0), threading.Semaphore(0), []

    def check_size(directory, target, stopped):
        checks.append(os.getpid())
        started.release()
        assert go_on.acquire(timeout=30)

    monkeypatch.setattr(blobcache, "check_size", check_size)
    cache = blobcache.BlobCache(str(tmp_path / "blobs"), 1000, 10, "test")
    assert started.acquire(timeout=30)
    blob = tmp_path / "blob"
    blob.write_bytes(b"x")
    taken = cache.take(p64(1), p64(0), str(blob), 1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            cache._count(500)
            if started.acquire(timeout=30) and checks[1:] == [os.getpid()]:
                status = 0
            go_on.release()
            cache.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "the child does not check"
    assert os.path.exists(taken), "the child has removed the parent's"
    go_on.release()
    cache.close()


def test_closing_ends_a_check_that_waits(tmp_path):
    """Another process is at it, and does not end."""
    directory = tmp_path / "blobs"
    blobcache.BlobCache(str(directory), None, 10, "first").close()
    with contextlib.closing(zc.lockfile.LockFile(str(directory / "check_size.lock"))):
        cache = blobcache.BlobCache(str(directory), 1000, 10, "test")
        checker = cache._checker
        # Not the second that it would wait before it looks again: it does not matter how long this takes.
        monotonic = time.monotonic()
        cache.close(timeout=30)
        assert checker is None or not checker.is_alive()
        assert time.monotonic() - monotonic < 10


def test_a_check_that_is_stopped_removes_nothing_more(tmp_path):
    directory = tmp_path / "7"
    directory.mkdir()
    (directory / "1.0000000000000001.blob").write_bytes(bytes(1000))
    stopped = threading.Event()
    stopped.set()
    blobcache.check_size(str(tmp_path), 0, stopped)
    assert len(list(directory.glob("*.blob"))) == 1
    blobcache.check_size(str(tmp_path), 0)
    assert not list(directory.glob("*.blob"))


def test_a_blob_that_cannot_be_kept_does_not_fail_what_is_committed(tmp_path, monkeypatch, caplog):
    cache = blobcache.BlobCache(str(tmp_path / "blobs"), None, 10, "test")
    taken = []
    for number in (1, 2):
        path = tmp_path / str(number)
        path.write_bytes(b"x")
        taken.append(cache.take(p64(number), p64(0), str(path), 7))

    rename = ZODB.blob.rename_or_copy_blob

    def full(source, target, chmod=True):
        if source == taken[0]:
            raise OSError(28, "No space left on device")
        rename(source, target, chmod)

    monkeypatch.setattr(ZODB.blob, "rename_or_copy_blob", full)
    cache.finished(7, p64(99))
    assert "No space left" in caplog.text and p64(1).hex() in caplog.text
    assert not any(map(os.path.exists, taken))
    assert [os.path.exists(cache.fshelper.getBlobFilename(p64(n), p64(99))) for n in (1, 2)] == [False, True]
