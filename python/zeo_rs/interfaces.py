"""Events of the client."""

import zope.interface


class StaleCache:
    """The cache has missed more transactions than the server remembers, and is about to be dropped.

    Published with ``ZODB.event.notify`` while the cache is still full. ``storage`` is the storage it belongs to.
    """

    def __init__(self, storage):
        self.storage = storage


class IServeable(zope.interface.Interface):
    """A storage that tells how to serve it."""

    def lastInvalidations(size):
        """The last ``size`` transactions, newest first: ``[(tid, [oid, ...]), ...]``."""
