"""`FileStorage`: the engine of the server as a ZODB storage in its own right.

Same file, arguments, interfaces and exceptions as ZODB's `FileStorage`, whose subclass it is for the sake of tools that ask
with `isinstance`; nothing of how that class reads or writes is used. The native half is `_zeo.FileStorageBase`.
"""

import base64
import contextlib
import logging
import os
import sys
import threading
import time
import uuid

from persistent.TimeStamp import TimeStamp
from zodbpickle.pickle import loads
from ZODB.blob import rename_or_copy_blob
from ZODB.BaseStorage import TransactionRecord as BaseTransactionRecord
from ZODB.FileStorage import FileStorage as ZODBFileStorage
from ZODB.FileStorage.FileStorage import FileStorageError, RedundantPackWarning
from ZODB.interfaces import IBlobStorageRestoreable, IMultiCommitStorage
from ZODB.POSException import ReadOnlyError, StorageTransactionError, UndoError
from ZODB.serialize import referencesf as zodb_referencesf
from ZODB.utils import z64
from zope.interface import alsoProvides, implementer

from zeo_rs._zeo import FileStorageBase, pack_file_storage, pack_file_storage_by
from zeo_rs.fileindex import FileIndex

__all__ = ["FileStorage", "TransactionIterator", "TransactionRecord"]


logger = logging.getLogger(__name__)


def _time(tid):
    return TimeStamp(tid).timeTime()


class TransactionRecord(BaseTransactionRecord):
    """A committed transaction; iterating over it gives its data records, as often as one likes."""

    def __init__(self, tid, status, user, description, extension, records):
        super().__init__(tid, status, user, description, extension)
        self._records = records

    def __iter__(self):
        return iter(self._records)


class TransactionIterator:
    """Transactions in order, as of the time the iterator was made."""

    def __init__(self, transactions):
        self._transactions = transactions

    def __iter__(self):
        return self

    def __next__(self):
        return TransactionRecord(*next(self._transactions))

    def close(self):
        self._transactions.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


@implementer(IMultiCommitStorage)
class FileStorage(FileStorageBase, ZODBFileStorage):
    """FileStorage(file_name, create=False, read_only=False, stop=None, quota=None, pack_gc=True, pack_keep_old=True,
    packer=None, blob_dir=None)

    create: start with an empty file, deleting an existing one and its blobs.
    read_only: take no lock and write nothing; a snapshot of the file as it is now.
    stop: a tid; show only what was committed before it (needs read_only).
    quota: bytes that the file may have; a record that would begin beyond it is refused.
    pack_gc, pack_keep_old: whether `pack` collects garbage and keeps the previous file as NAME.old.
    packer: a callable that packs instead (`ZODB.FileStorage.interfaces.IFileStoragePacker`).
    blob_dir: directory of the blobs; without it there are none.
    """

    #: An `IFileStoragePacker` that is to pack in place of the engine, or None.
    packer = None

    def __init__(
        self,
        file_name,
        create=False,
        read_only=False,
        stop=None,
        quota=None,
        pack_gc=True,
        pack_keep_old=True,
        packer=None,
        blob_dir=None,
    ):
        if read_only and create:
            raise ValueError("can't create a read-only file")
        if stop is not None and not read_only:
            raise ValueError("stop, a view of the past, needs read_only")
        self.__name__ = self._name = os.fspath(file_name)
        self._file_name = os.path.abspath(file_name)
        self._is_read_only = bool(read_only)
        self._pack_gc, self.pack_keep_old = pack_gc, pack_keep_old
        if packer is not None:
            self.packer = packer
        self.blob_dir = os.path.abspath(blob_dir) if blob_dir else None
        # of ZODB's users: wrappers, packers and tests take these
        self._lock = threading.RLock()
        self._commit_lock = threading.Lock()
        self._lock_acquire, self._lock_release = self._lock.acquire, self._lock.release
        self._commit_lock_acquire, self._commit_lock_release = self._commit_lock.acquire, self._commit_lock.release
        self._transaction = self._tid = None
        self._opened_file = None
        if read_only:
            os.stat(file_name)  # a missing file: Python's own words
        self._open(
            self._file_name,
            bool(create),
            self._is_read_only,
            stop,
            quota,
            bool(pack_gc),
            bool(pack_keep_old),
            self.blob_dir,
        )
        self._index = FileIndex(self)
        if self.blob_dir:
            self._blob_init(self.blob_dir)
            alsoProvides(self, IBlobStorageRestoreable)
        else:
            self._blob_init_no_blobs()

    # -- about itself

    def getName(self):
        return self._name

    sortKey = getName

    def supportsUndo(self):
        return True

    @property
    def _pos(self):
        return self.getSize()

    @property
    def _ltid(self):
        return self.lastTransaction()

    @property
    def _oid(self):
        return self._max_oid()

    def lastTid(self, oid):
        try:
            return self.getTid(oid)
        except KeyError:
            return None

    # -- two-phase commit

    def tpc_begin(self, transaction, tid=None, status=" "):
        if self._is_read_only:
            raise ReadOnlyError()
        if self._transaction is transaction and transaction is not None:
            raise StorageTransactionError("Duplicate tpc_begin calls for same transaction")
        # not owned by a thread: another one may finish or abort
        if not self._commit_lock.acquire(False):
            # in a forked child a thread of the parent may hold it for ever
            self._check_writable()
            self._commit_lock.acquire()
        try:
            self._tid = self._begin(transaction, tid, status, time.time())
        except BaseException:
            self._commit_lock.release()
            raise
        self._transaction = transaction

    def tpc_transaction(self):
        return self._transaction

    def tpc_finish(self, transaction, f=None):
        # as ZODB: whoever finishes or aborts the same transaction in another thread waits, and finds it gone
        with self._lock:
            if transaction is None or transaction is not self._transaction:
                raise StorageTransactionError("tpc_finish called with wrong transaction")
            try:
                return self._finish(transaction, f)
            finally:
                self._end(transaction)

    def tpc_abort(self, transaction):
        with self._lock:
            if transaction is self._transaction and self._abort(transaction):
                self._end(transaction)

    def _end(self, transaction):
        self._abort(transaction)  # what `_finish` did not take, so that nothing of it remains
        self._transaction = None
        self._commit_lock.release()

    def undo(self, transaction_id, transaction):
        if self._is_read_only:
            raise ReadOnlyError()
        if transaction is not self._transaction:
            raise StorageTransactionError(self, transaction)
        try:
            undone = base64.decodebytes(transaction_id + b"\n")
        except ValueError:
            undone = b""
        if len(undone) != 8:
            raise UndoError("Invalid transaction id")
        tid, oids = self._undo(undone, transaction)
        return tid, dict.fromkeys(oids).keys()

    def set_max_oid(self, oid):
        self._raise_oid(oid)

    # -- blobs

    def storeBlob(self, oid, oldserial, data, blobfilename, version, transaction):
        if self._is_read_only:
            raise ReadOnlyError()
        if version:
            raise TypeError("versions are not supported")
        staged = self._staged_blob()
        self._store_blob(oid, oldserial, data, staged, transaction)
        # taken at once: a savepoint removes its files before the vote
        rename_or_copy_blob(blobfilename, staged)

    def restoreBlob(self, oid, serial, data, blobfilename, prev_txn, transaction):
        if self._is_read_only:
            raise ReadOnlyError()
        staged = self._staged_blob()
        self._restore_blob(oid, serial, data, staged, prev_txn, transaction)
        rename_or_copy_blob(blobfilename, staged)

    def _staged_blob(self):
        return os.path.join(self.temporaryDirectory(), f"{uuid.uuid4().hex}.staged")

    # -- history

    def history(self, oid, size=1, filter=None):
        if filter is None:
            return [self._history_entry(*entry) for entry in self._history(oid, size)]
        found = []
        for entry in self._history(oid, sys.maxsize if size > 0 else 0):
            entry = self._history_entry(*entry)
            if filter(entry):
                found.append(entry)
                if len(found) >= size:
                    break
        return found

    @staticmethod
    def _history_entry(tid, size, user, description, extension):
        entry = loads(extension) if extension else {}
        entry.update(time=_time(tid), user_name=user, description=description, tid=tid, size=size)
        return entry

    @staticmethod
    def _undo_entry(tid, size, user, description, extension):
        entry = {
            "id": base64.encodebytes(tid).rstrip(),
            "time": _time(tid),
            "user_name": user,
            "size": size,
            "description": description,
        }
        if extension:
            # whatever an application put there must not hide the transaction from its operator
            with contextlib.suppress(Exception):
                entry.update(loads(extension))
        return entry

    def undoLog(self, first=0, last=-20, filter=None):
        if last < 0:
            last = first - last
        accept = None if filter is None else lambda *entry: filter(self._undo_entry(*entry))
        return [self._undo_entry(*entry) for entry in self._undo_log(first, last, accept)]

    def iterator(self, start=None, stop=None):
        return TransactionIterator(self._iterate(start, stop))

    # -- keeping

    def pack(self, t, referencesf, gc=None, *, progress=None, throttle=None):
        """Removes revisions that were not current at the time `t` (seconds) and, with `gc`, objects that nothing refers to.

        progress: called with a dict (phase, bytes_done, bytes_total, objects_done, objects_total); False cancels the pack.
        throttle: bytes that may be read and written a second.

        A storage with a `packer` of its own has no progress and no throttle to offer: TypeError.
        """
        if self._is_read_only:
            raise ReadOnlyError()
        if self.packer is not None:
            if progress is not None or throttle is not None:
                raise TypeError("progress and throttle are of the built-in pack, and this storage has a packer of its own")
            self._pack_by(self.packer, t, referencesf, gc)
            return
        if gc is not None:
            gc = bool(gc)
        if throttle is not None and not 0 < throttle < 2**64:
            raise ValueError(f"throttle is a number of bytes a second, 1 or more, not {throttle}")
        # ZODB's own finder of references reads pickles only, which needs no Python
        native = referencesf is zodb_referencesf
        pack_file_storage(self, t, self._commit_lock, None if native else referencesf, gc, progress, throttle)
        self._opened_file = None

    def _pack_by(self, packer, t, referencesf, gc):
        try:
            stop = TimeStamp(*time.gmtime(t)[:5], t % 60).raw()
        except (ValueError, OverflowError) as error:
            raise ValueError(f"Invalid pack time {t}: {error}") from error
        if stop == z64:
            raise FileStorageError("Invalid pack time")
        if not len(self):
            return
        try:
            pack_file_storage_by(self, packer, referencesf, stop, self._pack_gc if gc is None else bool(gc), self._commit_lock)
        except RedundantPackWarning as nothing_to_do:
            logger.info("%s", nothing_to_do)
        self._opened_file = None

    @property
    def _file(self):
        """The data file for those who read it themselves; another object after a pack."""
        if self._opened_file is None:
            self._opened_file = open(self._file_name, "rb", buffering=0)
        return self._opened_file

    def close(self):
        if self._opened_file is not None:
            self._opened_file.close()
        self._close()

    def cleanup(self):
        """Removes all files of the storage but the blobs."""
        for suffix in ("", ".old", ".tmp", ".lock", ".index", ".oid", ".pack"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._file_name + suffix)
