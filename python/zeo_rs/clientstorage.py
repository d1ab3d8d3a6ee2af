"""``ClientStorage``: a ZODB storage that lives on a ZEO server.

The client itself is Rust (``zeo_rs._zeo``). This module gives it ZEO's constructor and ZODB's interfaces, and does what is
ZODB's business in Python: conflict resolution, blob directories, iteration.

One file of more than 500 lines, because it is one class with the arguments and methods that ZEO's has.
"""

import contextlib
import errno
import logging
import os
import socket
import time
import warnings
import weakref
from typing import NamedTuple

import ZODB.BaseStorage
import ZODB.event
import ZODB.interfaces
import zope.interface
from ZODB.ConflictResolution import ConflictResolvingStorage
from ZODB.POSException import ConflictError, POSKeyError, ReadOnlyError, StorageTransactionError, Unsupported
from ZODB.utils import z64

from . import _zeo
from .blobcache import BlobCache, SharedBlobs
from .copying import copy
from .exceptions import ClientDisconnected
from .interfaces import StaleCache
from .tls import client_tls

logger = logging.getLogger(__name__)

MB = 1 << 20

#: Seconds that closing takes at most, if the machine has time.
CLOSE = 0.9

#: Conflicts of one transaction that are resolved in turn before it fails.
MAX_VOTES = 9

#: What a server's storage may declare and this one then declares too.
OPTIONAL_INTERFACES = {
    ("ZODB.interfaces", name): getattr(ZODB.interfaces, name)
    for name in (
        "IStorageRestoreable",
        "IStorageIteration",
        "IStorageUndoable",
        "IStorageCurrentRecordIteration",
        "IBlobStorage",
        "IExternalGC",
    )
}


#: Keys of what a server says of its storage.
SERVER_INFO = ("name", "length", "size", "supportsUndo", "supports_record_iternext", "interfaces")


class Connected(NamedTuple):
    """The connection that ``notify_connected`` is told of."""

    #: ``(host, port)``, or the path of the socket
    peername: tuple | str
    #: as bytes: ``b"M5"``, ``b"Z5"``
    protocol_version: bytes
    read_only: bool

    def get_peername(self):
        return self.peername

    def is_read_only(self):
        return self.read_only


@zope.interface.implementer(ZODB.interfaces.IMultiCommitStorage)
class ClientStorage(ConflictResolvingStorage, _zeo.ClientStorageBase):
    """A storage on a server. Takes the arguments of ZEO's class; safe for any number of threads.

    addr
        A port, ``(host, port)``, the path of a unix socket, or a list of such: servers of the same data.
    storage
        Name of the storage on the server.
    cache_size
        Bytes of the object cache, overhead included.
    wait, wait_timeout
        Whether to wait for the server now; for how many seconds calls wait for a connection (30).
    read_only, read_only_fallback
        Ask for a read-only connection; or for a writable one, but take a read-only one until there is one.
    blob_dir, shared_blob_dir, blob_cache_size, blob_cache_size_check
        Where blobs are kept; whether that is the server's own directory; how many bytes to keep, and after how
        many percent of them to look.
    cache, or client and var
        File to keep the cache in: its path, or its directory ``var`` and the beginning of its name. In memory otherwise.
    cache_trace
        File to append every use of the cache to, for ``zeo-rs cache-stats`` and ``cache-simul``. The environment variable
        ``ZEO_CACHE_TRACE``, if set, means the name of the cache's file with ``.trace``.
    client_label
        Shown in the server's log.
    ssl, ssl_server_hostname
        ``zeo_rs.TLS`` or an ``ssl.SSLContext``: speak TLS; the host name to check instead of the address's.
    server_sync
        Whether ``sync()``, called when a transaction begins, asks the server for everything committed until now.
    """

    def __init__(
        self,
        addr,
        storage="1",
        cache_size=20 * MB,
        name="",
        wait_timeout=None,
        disconnect_poll=None,
        read_only=0,
        read_only_fallback=0,
        blob_dir=None,
        shared_blob_dir=False,
        blob_cache_size=None,
        blob_cache_size_check=10,
        client_label=None,
        cache=None,
        ssl=None,
        ssl_server_hostname=None,
        client=None,
        var=None,
        min_disconnect_poll=1,
        max_disconnect_poll=None,
        wait=True,
        drop_cache_rather_verify=True,
        credentials=None,
        server_sync=False,
        username=None,
        password=None,
        realm=None,
        cache_trace=None,
    ):
        if credentials is not None or username or password or realm:
            warnings.warn(
                "credentials, username, password and realm give no security: the protocol has no"
                " authentication. Use TLS with client certificates.",
                stacklevel=2,
            )
        if isinstance(addr, int):
            addr = ("127.0.0.1", addr)
        # What is wrong is refused before anything is made.
        addresses = _addresses(addr)
        cache_path = _cache_path(cache, client, var, storage)
        self.__name__ = name or str(addr)
        self._addr = addr
        self._storage = storage
        self._db = None
        self._server_addr = None
        self._resolved_server_addr = None
        self._connection_generation = 0
        self.protocol_version = None
        self._iterators = weakref.WeakSet()
        #: objects with ``invalidated(tid, oids)`` and ``closed()``, called on any thread
        self._watchers = ()
        self._is_closed = False
        self._dropped_iterators = []
        self.server_sync = server_sync
        self.blob_dir = blob_dir
        self.shared_blob_dir = shared_blob_dir
        self._blobs = None
        self.fshelper = None
        if blob_dir is not None:
            if shared_blob_dir:
                self._blobs = SharedBlobs(blob_dir)
            else:
                self._blobs = BlobCache(blob_dir, blob_cache_size, blob_cache_size_check, self.__name__)
            self.fshelper = self._blobs.fshelper
        wait_timeout = wait_timeout or 30
        if cache_trace is None and cache_path is not None and os.environ.get("ZEO_CACHE_TRACE"):
            cache_trace = f"{cache_path}.trace"
        logger.info(
            "%s %s (pid=%d) created %s/%s for storage: %r",
            self.__name__,
            self.__class__.__name__,
            os.getpid(),
            "RO" if read_only else "RW",
            "fallback" if read_only_fallback else "normal",
            storage,
        )
        self._open(
            addresses,
            storage,
            self.__name__,
            "wr" if read_only_fallback else "r" if read_only else "w",
            wait_timeout,
            cache_size,
            client_label,
            client_tls(ssl, ssl_server_hostname),
            cache_path,
            cache_trace,
        )
        if wait:
            try:
                self._wait_connected(wait_timeout)
            except BaseException:
                self._close()
                raise

    # ---- life

    def close(self):
        """End the connection and the background threads, within a second. May be called again."""
        deadline = time.monotonic() + CLOSE
        if self._blobs is not None:
            self._blobs.stop()
        self._close()
        if self._blobs is not None:
            self._blobs.close(max(deadline - time.monotonic(), 0))
        self._is_closed = True
        for watcher in self._watchers:
            watcher.closed()
        self.ping = self.sync = None  # they refer to the storage

    def new_addr(self, addr):
        """Other servers of the same data, from the next connection on."""
        if isinstance(addr, int):
            addr = ("127.0.0.1", addr)
        self._set_addresses(_addresses(addr))
        self._addr = addr

    def registerDB(self, db):
        """Take the database to be told of invalidations.

        Costs a round trip: ZODB, which looks next whether there is a root, does so as of ``lastTransaction()``, and fails
        if another client has created it and we have not heard of it yet.
        """
        super().registerDB(db)
        self._db = db
        if self._is_connected():
            with contextlib.suppress(ClientDisconnected):
                self._ping()

    def sync(self):
        """Nothing: the client is kept up to date as things happen (see ``server_sync``)."""

    def is_connected(self, test=False):
        return self._is_connected()

    # ---- told by the client, one at a time, on its background thread (invalidations also on that of a caller that waits for what is behind them)

    def _invalidate(self, tid, oids):
        try:
            self.invalidateTransaction(tid, oids)
        except BaseException:
            # it does not know what has changed: it has to forget everything, or it would go on with what is old
            self.invalidateCache()
            raise  # into the log
        finally:
            for watcher in self._watchers:
                watcher.invalidated(tid, oids)

    def _invalidate_cache(self):
        self.invalidateCache()
        for watcher in self._watchers:
            watcher.invalidated(None, None)

    def invalidateTransaction(self, tid, oids):
        """Another client has committed: tell the database. For subclasses; must not call the server."""
        if self._db is not None:
            self._db.invalidate(tid, oids)

    def invalidateCache(self):
        """Anything may have changed: tell the database. For subclasses; must not call the server."""
        if self._db is not None:
            self._db.invalidateCache()

    def _connected(self, host, port, protocol, read_only, generation):
        self._server_addr = host if port is None else (host, port)
        self._resolved_server_addr = None
        self.protocol_version = protocol.encode()
        self._connection_generation += 1
        for interface in self._info("interfaces") or ():
            known = OPTIONAL_INTERFACES.get(tuple(interface))
            if known is not None and not known.providedBy(self):
                zope.interface.alsoProvides(self, known)
        self.ping = self._ping
        if self.server_sync:
            self.sync = self._ping
        info = {key: value for key in SERVER_INFO if (value := self._info(key)) is not None}
        self.notify_connected(Connected(self._server_addr, self.protocol_version, bool(read_only)), info)

    def _disconnected(self):
        self._connection_generation += 1
        self.notify_disconnected()

    def _stale_cache(self):
        ZODB.event.notify(StaleCache(self))

    def notify_connected(self, conn, info):
        """A connection is ready: a ``Connected``, and what the server says of its storage. For subclasses; must not call the
        server."""

    def notify_disconnected(self):
        """The connection was lost. For subclasses; must not call the server."""

    # ---- state

    def getName(self):
        return f"{self.__name__} ({'connected' if self._is_connected() else 'disconnected'})"

    def sortKey(self):
        """The same in all clients of one server: orders commits over several databases."""
        address = self._server_addr
        if address is None:
            raise ClientDisconnected("sortKey before the first connection")
        if self._resolved_server_addr is None:
            if isinstance(address, tuple):
                host, port = address
                try:
                    host = socket.gethostbyaddr(host)[0]
                except OSError:
                    pass
                address = str((host, port))
            self._resolved_server_addr = address
        return f"{self._storage}:{self._resolved_server_addr}"

    def __len__(self):
        return self._info("length") or 0

    def __bool__(self):
        return True

    def getSize(self):
        return self._info("size") or 0

    def supportsUndo(self):
        return bool(self._info("supportsUndo"))

    def isReadOnly(self):
        return not self._is_connected() or self._is_read_only()

    is_read_only = isReadOnly

    # ---- calls

    def pack(self, t=None, referencesf=None, wait=1, days=0):
        """Remove revisions that were not current at ``t`` (default: now), less ``days``."""
        if t is None:
            t = time.time()
        self._pack(t - days * 86400, bool(wait))

    def iterator(self, start=None, stop=None):
        """The transactions from ``start`` to ``stop``, both included."""
        return TransactionIterator(self, start, stop)

    def copyTransactionsFrom(self, other, verbose=0):
        """Copy every transaction of ``other``, with tids and status; and blobs, if both have a directory for them."""
        copy(other, self)

    # ---- two-phase commit

    def tpc_vote(self, txn):
        """Vote; resolve the conflicts that the server leaves to its clients, and vote again."""
        resolved = []
        for _ in range(MAX_VOTES):
            try:
                answer = self._vote(txn)
            except ConflictError:
                self._drop_blobs(txn)
                raise
            conflicts = [item for item in answer if isinstance(item, dict)]
            resolved.extend(item for item in answer if not isinstance(item, dict))
            if not conflicts:
                return resolved or None
            for conflict in conflicts:
                oid, (committed, read) = conflict["oid"], conflict["serials"]
                data = self.tryToResolveConflict(oid, committed, read, conflict["data"])
                self.store(oid, committed, data, "", txn)
                resolved.append(oid)
        raise ConflictError(f"still conflicts after {MAX_VOTES} votes")

    def tpc_finish(self, txn, f=None):
        self._gc_iterators()
        tid = self._finish(txn, f)
        if self._blobs is not None:
            self._blobs.finished(id(txn), tid)
        return tid

    def tpc_abort(self, txn, timeout=None):
        self._gc_iterators()
        self._drop_blobs(txn)
        self._abort(txn)

    def _drop_blobs(self, transaction):
        if self._blobs is not None:
            self._blobs.aborted(id(transaction))

    # ---- blobs

    def _blob_storage(self):
        if self._blobs is None:
            raise Unsupported("Blobs need a blob_dir: give ClientStorage one.")
        return self._blobs

    def storeBlob(self, oid, serial, data, blobfilename, version, txn):
        """Store an object with its blob. Takes the file over."""
        assert not version
        if self._is_read_only():
            raise ReadOnlyError()
        blobs = self._blob_storage()
        if not self._is_committing(txn):
            raise StorageTransactionError(self.tpc_transaction(), txn)
        path = blobs.take(oid, serial, blobfilename, id(txn))
        self._store_blob(oid, serial, data, path, self.shared_blob_dir, txn)

    def restoreBlob(self, oid, serial, data, blobfilename, prev_txn, transaction):
        """Store a blob as of the tid that the transaction was begun with, which must be ``serial``. Takes the file over.

        The protocol has no message for that: it is an ordinary store over the current revision.
        """
        try:
            current = self.getTid(oid)
        except POSKeyError:
            current = z64
        self.storeBlob(oid, current, data, blobfilename, "", transaction)

    def loadBlob(self, oid, serial):
        """Path of the blob's committed file; it may go when the cache is full, an open file stays readable."""
        return self._blob_storage().load(self, oid, serial)

    def openCommittedBlobFile(self, oid, serial, blob=None):
        return self._blob_storage().open(self, oid, serial, blob)

    def temporaryDirectory(self):
        return self._blob_storage().fshelper.temp_dir

    # ---- iterators

    def _gc_iterators(self):
        while self._dropped_iterators:
            dropped, self._dropped_iterators = self._dropped_iterators, []
            by_connection = {}
            for generation, iid in dropped:
                by_connection.setdefault(generation, []).append(iid)
            for generation, iids in by_connection.items():
                self._iterator_gc(generation, iids)


class _ServerIterator:
    """What the server keeps a cursor for, one call for each item. Lives in one connection."""

    _ended = True  # until there is a cursor

    def _start(self, storage, generation, iid):
        self._storage, self._generation, self._iid = storage, generation, iid
        self._ended = False

    def __iter__(self):
        return self

    def _next(self, call):
        """What ``call`` answers; after the last item StopIteration, and the server has forgotten it."""
        if self._ended:
            raise StopIteration
        answer = call(self._generation, self._iid)
        if answer is None:
            self._ended = True
            raise StopIteration
        return answer

    def _drop(self):
        if not self._ended:
            self._ended = True
            self._storage._dropped_iterators.append((self._generation, self._iid))

    def __del__(self):
        self._drop()


class TransactionIterator(_ServerIterator):
    """Transactions of the server."""

    def __init__(self, storage, start, stop):
        self._start(storage, *storage._iterator_start(start, stop))

    def __next__(self):
        return TransactionRecord(self, *self._next(self._storage._iterator_next))

    next = __next__

    def close(self):
        """Let the server forget it."""
        self._drop()


class TransactionRecord(ZODB.BaseStorage.TransactionRecord):
    """A transaction; iterates over its data records, which must be done before the next transaction is asked for."""

    def __init__(self, transactions, tid, status, user, description, extension):
        super().__init__(tid, status, user, description, extension)
        self._transactions = transactions

    def __iter__(self):
        return RecordIterator(self._transactions, self.tid)


class RecordIterator(_ServerIterator):
    """The data records of one transaction."""

    def __init__(self, transactions, tid):
        storage, generation = transactions._storage, transactions._generation
        self._start(storage, generation, storage._iterator_record_start(generation, transactions._iid, tid))

    def __next__(self):
        return ZODB.BaseStorage.DataRecord(*self._next(self._storage._iterator_record_next))

    next = __next__


def _cache_path(cache, client, var, storage):
    """The file that the cache is kept in; None for one in memory only."""
    if cache is not None:
        if not isinstance(cache, (str, os.PathLike)):
            raise TypeError(
                f"cache={cache!r}: the cache of this client is its own, an object of another class cannot take its place;"
                " pass the path of a file to keep it in, or nothing for one in memory, and its size as cache_size"
            )
        path = os.fspath(cache)
    elif client:
        path = os.path.join(var or os.getcwd(), f"{client}-{storage}.zrc")
    else:
        return None
    if os.path.isdir(path):
        raise IsADirectoryError(
            errno.EISDIR, "cache: this is a directory; give the path of a file, which will be made in it", os.fspath(path)
        )
    return path


def _addresses(addr):
    """A list of paths and ``(host, port)``. ``ValueError`` for anything else."""
    hint = "use a port, (host, port), the path of a unix socket as text, or a list of such"
    if isinstance(addr, (str, os.PathLike)):
        return [os.fspath(addr)]
    if isinstance(addr, tuple) and len(addr) == 2 and isinstance(addr[1], int):
        return [addr]
    if isinstance(addr, (bytes, bytearray)):
        raise ValueError(f"{addr!r} is no address: {hint}")
    addresses = [("127.0.0.1", one) if isinstance(one, int) else one for one in addr]
    if not addresses:
        raise ValueError(f"there is no address in {addr!r}: {hint}")
    for one in addresses:
        if isinstance(one, (bytes, bytearray)):
            raise ValueError(f"{one!r} is no address: {hint}")
    return addresses
