"""Where a client keeps blobs: a cache of its own, or the server's directory.

Both share their directory with other processes, ZEO's Python clients among them: same names, same lock files
(``zc.lockfile``), same order of eviction.
"""

import fcntl
import logging
import os
import re
import signal
import threading
import time
import weakref

import zc.lockfile
import ZODB.blob
from ZODB.POSException import POSKeyError
from ZODB.utils import u64

logger = logging.getLogger(__name__)

LAYOUT = "zeocache"
#: Directories of the cache layout; oids are spread over them.
DIRECTORIES = 997

LOCK_POLL = 0.01
LOCK_TIMEOUT = 600.0


#: Every ``Blobs`` of this process.
_open = weakref.WeakSet()


def _after_fork_in_child():
    for blobs in list(_open):
        blobs._in_this_process()


os.register_at_fork(after_in_child=_after_fork_in_child)


class CacheLayout:
    """``<oid mod 997>/<oid div 997>.<tid in hex>.blob``"""

    def oid_to_path(self, oid):
        return str(u64(oid) % DIRECTORIES)

    def getBlobFilePath(self, oid, tid):
        base, directory = divmod(u64(oid), DIRECTORIES)
        return os.path.join(str(directory), f"{base}.{tid.hex()}{ZODB.blob.BLOB_SUFFIX}")


class Blobs:
    """Files of the transaction being committed; what a cache and a shared directory have in common."""

    def __init__(self):
        self._in_this_process()
        _open.add(self)

    def _in_this_process(self):
        """Begin anew, also in a forked child: what the parent has is its own, and locks may be held by threads of it."""
        self._taken = {}

    def take(self, oid, serial, filename, transaction):
        """Move a file to where it can be renamed into place later. Returns its path."""
        self.fshelper.createPathForOID(oid)
        fd, name = self.fshelper.blob_mkstemp(oid, serial)
        os.close(fd)
        # Only names ending in .tmp and one character are taken from clients by servers.
        target = name + "-"
        ZODB.blob.rename_or_copy_blob(filename, target)
        os.remove(name)
        os.chmod(target, 0o444)
        self._taken.setdefault(transaction, []).append((oid, target))
        return target

    def aborted(self, transaction):
        for _, path in self._taken.pop(transaction, ()):
            _remove(path)

    def open(self, storage, oid, serial, blob=None):
        path = self.load(storage, oid, serial)
        if blob is None:
            return open(path, "rb")
        return ZODB.blob.BlobFile(path, "r", blob)

    def stop(self):
        """Closing begins."""

    def close(self, timeout=1):
        for transaction in list(self._taken):
            self.aborted(transaction)


class SharedBlobs(Blobs):
    """The server's blob directory, on a shared file system."""

    def __init__(self, directory):
        super().__init__()
        self.fshelper = ZODB.blob.FilesystemHelper(directory)

    def finished(self, transaction, tid):
        # The server has moved the files.
        self._taken.pop(transaction, None)

    def load(self, storage, oid, serial):
        path = self.fshelper.getBlobFilename(oid, serial)
        if not os.path.exists(path):
            raise POSKeyError("No blob file", oid, serial)
        return path


class BlobCache(Blobs):
    """A directory of downloaded blobs, kept at ``size`` bytes in the background."""

    def __init__(self, directory, size, check_percent, name):
        super().__init__()
        ZODB.blob.LAYOUTS.setdefault(LAYOUT, CacheLayout())
        self.fshelper = ZODB.blob.FilesystemHelper(directory, layout_name=LAYOUT)
        _make(directory)
        self.fshelper.create()
        self.directory = directory
        self._name = name
        self._limit = size
        self._check_after = self._target = None
        if size is not None:
            if not 0 <= check_percent < 100:
                raise ValueError(f"blob_cache_size_check is a percentage below 100, not {check_percent}")
            self._check_after = size * check_percent // 100
            self._target = max(size - self._check_after, 0)
            self._check()

    def _in_this_process(self):
        super()._in_this_process()
        self._added = 0
        self._lock = threading.Lock()
        self._checker = None
        self._again = False
        self._stopped = threading.Event()

    def finished(self, transaction, tid):
        """Never fails: the transaction is committed, and what is not in the cache is downloaded when it is wanted."""
        for oid, path in self._taken.pop(transaction, ()):
            try:
                self._keep(oid, path, tid)
            except Exception:
                logger.exception("the blob %s of %s, just committed, cannot be kept in %s", oid.hex(), tid.hex(), self.directory)
                _remove(path)

    def _keep(self, oid, path, tid):
        target = self.fshelper.getBlobFilename(oid, tid)
        size = os.stat(path).st_size
        lock = _lock_directory(os.path.dirname(target))
        try:
            ZODB.blob.rename_or_copy_blob(path, target, chmod=False)
        finally:
            lock.close()
        self._count(size)

    def load(self, storage, oid, serial):
        path = self.fshelper.getBlobFilename(oid, serial)
        if _used(path):
            return path
        self.fshelper.createPathForOID(oid)
        lock = _lock_directory(os.path.dirname(path))
        try:
            return self._load_locked(storage, oid, serial, path)
        finally:
            lock.close()

    def open(self, storage, oid, serial, blob=None):
        try:
            return super().open(storage, oid, serial, blob)
        except FileNotFoundError:
            # Evicted between finding and opening it: keep the directory locked this time.
            path = self.fshelper.getBlobFilename(oid, serial)
            lock = _lock_directory(os.path.dirname(path))
            try:
                self._load_locked(storage, oid, serial, path)
                return open(path, "rb") if blob is None else ZODB.blob.BlobFile(path, "r", blob)
            finally:
                lock.close()

    def stop(self):
        """Let a check that runs end where it is; another will go on with it."""
        self._stopped.set()

    def close(self, timeout=1):
        self.stop()
        super().close()
        checker = self._checker
        if checker is not None:
            checker.join(timeout)

    def _load_locked(self, storage, oid, serial, path):
        if not _used(path):
            size = storage._download_blob(oid, serial, path)
            if not os.path.exists(path):
                raise POSKeyError("No blob file", oid, serial)
            self._count(size or 0)
        return path

    def _count(self, size):
        if self._limit is None:
            return
        with self._lock:
            self._added += size
            due = self._added >= self._check_after
        if due:
            self._check()

    def _check(self):
        with self._lock:
            self._added = 0
            self._again = True
            if self._checker is not None:
                return
            self._checker = threading.Thread(
                target=self._run_checks, name=f"{self._name} zeo blob cache check", daemon=True
            )
            self._checker.start()

    def _run_checks(self):
        while True:
            with self._lock:
                if not self._again or self._stopped.is_set():
                    self._checker = None
                    return
                self._again = False
            try:
                check_size(self.directory, self._target, self._stopped)
            except Exception:
                logger.exception("the blob cache %s could not be checked", self.directory)


def _make(directory):
    """What ``FilesystemHelper.create`` would make, but fit for several processes that start at one moment: none of them
    finds a directory half made, or a marker without its text."""
    temporary = os.path.join(directory, "tmp")
    os.makedirs(temporary, exist_ok=True)
    marker = os.path.join(directory, ZODB.blob.LAYOUT_MARKER)
    if os.path.exists(marker):
        return
    new = os.path.join(temporary, f"layout.{os.getpid()}.{threading.get_ident()}")
    with open(new, "w") as file:
        file.write(LAYOUT)
    try:
        os.link(new, marker)
    except OSError:
        pass  # another process was first; or no hard links here, then ZODB writes it
    finally:
        os.remove(new)


def check_size(directory, target, stopped=None):
    """Remove the files used longest ago until at most ``target`` bytes are left, or the event ``stopped`` is set.

    One process at a time: another that wants to leaves a mark, on which the first one looks again.
    """
    if stopped is None:
        stopped = threading.Event()
    attempt = os.path.join(directory, "check_size.attempt")
    lock_path = os.path.join(directory, "check_size.lock")
    lock = _try_lock(lock_path)
    if lock is None:
        stopped.wait(1)
        lock = _try_lock(lock_path)
    if lock is None:
        with open(attempt, "w"):
            return
    try:
        while True:
            total, files = _scan(directory, stopped)
            for _, path, size in sorted(files):
                if total <= target or stopped.is_set():
                    break
                if _evict(path):
                    total -= size
            if stopped.is_set() or not os.path.exists(attempt):
                return
            _remove(attempt)
    finally:
        lock.close()


def _scan(directory, stopped):
    total, files = 0, []
    for name in os.listdir(directory):
        if stopped.is_set():
            break
        if not re.fullmatch(r"\d+", name):
            continue
        for entry in os.scandir(os.path.join(directory, name)):
            if entry.name.endswith(ZODB.blob.BLOB_SUFFIX):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                total += stat.st_size
                files.append((stat.st_atime, entry.path, stat.st_size))
    return total, files


def _evict(path):
    lock = _try_lock(os.path.join(os.path.dirname(path), ".lock"))
    if lock is None:
        return False
    try:
        return not _is_open(path) and _remove(path)
    finally:
        lock.close()


def _is_open(path):
    """Whether any process has the file open: the kernel gives a write lease only on one that nobody else has.

    Who has it open could go on reading, but not open it again by its name, as applications do with ``committed()``.
    Where there are no leases (network file systems, files of another user) the answer is no.
    """
    try:
        with open(path, "rb") as file:
            # Who opens the file in between lets the kernel send a signal here. SIGIO would end the process.
            fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _remove(path):
    try:
        os.remove(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)
        return False
    return True


def _used(path):
    """Whether the file is there; marks it used, since mounts often keep no access times."""
    try:
        os.utime(path, (time.time(), os.stat(path).st_mtime))
    except FileNotFoundError:
        return False
    except OSError:
        return os.path.exists(path)
    return True


def _try_lock(path):
    try:
        return zc.lockfile.LockFile(path)
    except zc.lockfile.LockError:
        return None


def _lock_directory(directory):
    path = os.path.join(directory, ".lock")
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        lock = _try_lock(path)
        if lock is not None:
            return lock
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} stays locked by another process")
        time.sleep(LOCK_POLL)
