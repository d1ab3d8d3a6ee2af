"""Copies of whole histories between storages: transactions with their tids, status and metadata, records, blobs."""

import os
import tempfile

import ZODB.blob
from ZODB.POSException import POSKeyError

#: Bytes of a blob that are copied at once.
CHUNK = 1 << 20


class Progress:
    """What has been copied so far."""

    def __init__(self):
        self.transactions = self.records = self.blobs = self.bytes = 0
        #: of the blob that is being copied into a file; those being sent are in the storage's `blob_stats`
        self.blob_bytes = 0


def copy(source, destination, start=None, progress=None):
    """Copy the transactions of ``source`` from ``start`` (a tid, included) on. Returns a ``Progress``.

    ``progress`` is called with it after every record, and while a blob is copied. Each transaction is committed by itself: a copy that ends early, or is
    interrupted, leaves whole transactions, and can be gone on with from the tid after the last one.

    Blobs are copied if both storages keep some; a blob whose file is missing in the source is copied without it, as a record.
    """
    done = Progress()
    blobs = keeps_blobs(source) and keeps_blobs(destination)
    for transaction in source.iterator(start):
        destination.tpc_begin(transaction, transaction.tid, transaction.status)
        try:
            for record in transaction:
                _copy_record(source, destination, record, transaction, blobs, done, progress)
                if progress is not None:
                    progress(done)
            destination.tpc_vote(transaction)
        except BaseException:
            destination.tpc_abort(transaction)
            raise
        destination.tpc_finish(transaction)
        done.transactions += 1
    if progress is not None:
        progress(done)
    return done


def _copy_record(source, destination, record, transaction, blobs, done, progress):
    done.records += 1
    done.bytes += len(record.data or b"")
    path = _blob(source, record) if blobs else None
    if path is None:
        destination.restore(record.oid, record.tid, record.data, "", record.data_txn, transaction)
        return
    # The destination takes the file over; the source keeps its own.
    fd, name = tempfile.mkstemp(suffix=".tmp", dir=destination.temporaryDirectory())
    with os.fdopen(fd, "wb") as target, source.openCommittedBlobFile(record.oid, record.tid) as file:
        size = 0
        while chunk := file.read(CHUNK):
            target.write(chunk)
            size += len(chunk)
            if progress is not None and not hasattr(destination, "blob_stats"):
                done.blob_bytes = size
                progress(done)
    destination.restoreBlob(record.oid, record.tid, record.data, name, record.data_txn, transaction)
    done.blobs += 1
    done.blob_bytes = 0
    done.bytes += size


def keeps_blobs(storage):
    if not hasattr(storage, "restoreBlob") and not hasattr(storage, "loadBlob"):
        return False
    try:
        return bool(storage.temporaryDirectory())
    except Exception:  # no blob directory; every storage says it with an exception of its own
        return False


def _blob(source, record):
    if not record.data or not ZODB.blob.is_blob_record(record.data):
        return None
    try:
        return source.loadBlob(record.oid, record.tid)
    except POSKeyError:
        return None
