"""The directory of downloaded blobs."""

import os
import subprocess
import sys
import threading

from zeo_rs import blobcache


def test_what_is_added_during_a_check_is_checked_after_it(tmp_path, monkeypatch):
    started, go_on, checks = threading.Semaphore(0), threading.Semaphore(0), []

    def check_size(directory, target):
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
