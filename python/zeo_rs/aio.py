"""The asyncio API: loads, history, iteration, packing and news of a ZEO server, for programs that are not ZODB applications; and a server.

>>> async def main(addr):                                       # doctest: +SKIP
...     async with await zeo_rs.aio.connect(addr) as storage:
...         data, tid, end_tid = await storage.load(oid)

It shares connection and cache with the synchronous ``ClientStorage`` under it (``AsyncStorage.storage``), which may be
used at the same time. Oids and tids are 8 bytes, big-endian. Errors are those of ``ClientStorage``.
"""

import asyncio
import contextlib
import logging
import time
import weakref
from typing import NamedTuple

from ZODB.utils import maxtid

from . import _zeo
from .clientstorage import ClientStorage

__all__ = ["AsyncStorage", "Invalidation", "PackProgress", "connect", "serve"]

logger = logging.getLogger(__name__)

#: Seconds between two looks at the progress of a pack.
LOOK_EVERY = 0.2


class Invalidation(NamedTuple):
    """One transaction of another client. ``tid`` and ``oids`` are ``None`` after a reconnect that may have missed some."""

    tid: bytes | None
    oids: list[bytes] | None


class PackProgress(NamedTuple):
    """How far a pack is. ``phase`` is ``"done"`` in the last one."""

    phase: str
    bytes_done: int
    bytes_total: int


async def connect(addr, **options):
    """An ``AsyncStorage`` on a ``ClientStorage(addr, **options)`` of its own, once it is connected."""
    storage = await asyncio.to_thread(ClientStorage, addr, **options)
    return AsyncStorage(storage, close=True)


@contextlib.asynccontextmanager
async def serve(path=None, blob_dir=None, storage_conf=None, zeo_conf=None, port=0, ssl=None):
    """A server beside an asyncio program, until the end of the ``async with``. The arguments are those of ``zeo_rs.server``.

    >>> async with zeo_rs.aio.serve("Data.fs", port=8100) as server:     # doctest: +SKIP
    ...     print(server.address, server.status())

    It has threads of its own: neither keeps the event loop busy nor waits for it. At the end, and if it is cancelled at any
    time, it is stopped in good order: clients that have voted may finish, storages are closed.
    """
    from .embedded import configuration, start_threaded

    text = configuration(path, blob_dir, storage_conf, zeo_conf, port)
    server = await _to_its_end(start_threaded, lambda server: server.stop(), text, ssl)
    try:
        yield server
    finally:
        await _to_its_end(server.stop, lambda _: None)


async def _to_its_end(function, undo, *args):
    """``function(*args)`` in a thread. A cancellation waits for it, and for ``undo(result)``."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        result = await work
        await asyncio.to_thread(undo, result)
        raise


class AsyncStorage:
    """A ``ClientStorage`` for asyncio. ``close``: it is closed with this, otherwise it stays as it was."""

    def __init__(self, storage, close=False):
        self.storage = storage
        self._close = close
        self._news = weakref.WeakSet()
        self._client = _zeo.AsyncClient(storage)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        await self.close()

    async def close(self):
        """Ends all :meth:`invalidations`, and closes the storage if it is this object's own."""
        for news in list(self._news):
            news.closed()
        if self._close:
            await self._client.run(self.storage.close)

    async def load(self, oid, before=maxtid):
        """The revision just before ``before``: ``(data, tid, end tid or None)``; ``None`` if it is younger.

        Raises ``POSKeyError`` for an object that does not exist.
        """
        return await self._client.load(oid, before)

    async def load_many(self, oids, before=maxtid):
        """``{oid: (data, tid, end tid or None)}`` in a few round trips; what does not exist is missing."""
        return await self._client.load_many(oids, before)

    async def last_transaction(self):
        """Tid of the newest transaction of the server."""
        await self._client.run(self.storage.ping)
        return self.storage.lastTransaction()

    async def history(self, oid, size=1):
        """The newest ``size`` revisions, as ``IStorageHistory`` describes them."""
        return await self._client.run(lambda: self.storage.history(oid, size))

    async def iterate(self, start=None, stop=None):
        """Asynchronous iterator of ``(transaction, [record, ...])`` with ``start <= tid <= stop``."""
        transactions = await self._client.run(lambda: self.storage.iterator(start, stop))

        def following():
            for transaction in transactions:
                return transaction, list(transaction)
            return None

        try:
            while (found := await self._client.run(following)) is not None:
                yield found
        finally:
            transactions.close()

    async def pack(self, before=None):
        """Packs up to the Unix time ``before`` (now). Asynchronous iterator of ``PackProgress``; ends with the pack.

        A ZEO server tells nothing on the way; then only the last one comes. Who is cancelled, or leaves the loop early, does
        not wait: the server goes on packing, and an error of it is logged.
        """
        before = time.time() if before is None else before
        work = asyncio.ensure_future(self._client.run(lambda: self.storage.pack(before)))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=LOOK_EVERY)
                pack = None if work.done() else (await self.status()).get("pack")
                if pack:
                    yield PackProgress(pack["phase"], pack["bytes_done"], pack["bytes_total"])
            await work
        except Exception:
            # of the status: more likely than not the pack has failed too, and says more
            await work
            raise
        finally:
            # not waited for by who has been cancelled
            if not work.done():
                work.add_done_callback(_note_pack)
        yield PackProgress("done", 0, 0)

    async def status(self):
        """The server's status of this storage, as ``ClientStorage.server_status``."""
        return await self._client.run(self.storage.server_status)

    def invalidations(self):
        """Asynchronous iterator of ``Invalidation``: the transactions of other clients, in order, from this call on.

        It ends when this object or the storage is closed, after what came before that. ``aclose()``, or dropping it,
        unsubscribes it.
        """
        return Invalidations(self)


class Invalidations:
    """What ``AsyncStorage.invalidations`` returns. Subscribed as soon as it is made, in a running event loop."""

    def __init__(self, storage):
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue()
        self._ended = False
        self._storage = storage.storage
        # weakly: who drops the iterator unsubscribes it
        self._watcher = _Watcher(weakref.ref(self))
        storage._news.add(self)
        self._storage._watchers += (self._watcher,)
        if self._storage._is_closed:
            self.closed()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._ended:
            raise StopAsyncIteration
        news = await self._queue.get()
        if news is None:
            self._ended = True
            self._queue.put_nowait(None)  # for another task that waits too
            raise StopAsyncIteration
        return news

    async def aclose(self):
        """Hear no more."""
        self._ended = True
        self._unsubscribe()
        self._queue.put_nowait(None)

    def closed(self):
        """On any thread: nothing more will come."""
        self._unsubscribe()
        self._put(None)

    def _put(self, news):
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, news)

    def _unsubscribe(self):
        self._storage._watchers = tuple(w for w in self._storage._watchers if w is not self._watcher)

    def __del__(self):
        if hasattr(self, "_watcher"):
            self._unsubscribe()


class _Watcher:
    """What the storage calls, on any thread."""

    def __init__(self, news):
        self._news = news

    def invalidated(self, tid, oids):
        news = self._news()
        if news is not None:
            news._put(Invalidation(tid, oids and list(oids)))

    def closed(self):
        news = self._news()
        if news is not None:
            news.closed()


def _note_pack(work):
    """The end of a pack that nobody waits for any more."""
    if not work.cancelled() and work.exception() is not None:
        logger.warning("a pack that nobody waits for has failed: %s", work.exception())
