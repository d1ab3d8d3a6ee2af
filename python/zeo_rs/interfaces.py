"""Interfaces and events, with the names that ``ZEO.interfaces`` gives them."""

import zope.interface


class StaleCache:
    """Event: a client's cache is too old to be verified and is about to be dropped (``ZODB.event.notify``)."""

    def __init__(self, storage):
        self.storage = storage


class Serving:
    """Event: a server has begun to listen. ``address`` is where, ``server`` who."""

    def __init__(self, server, address):
        self.server = server
        self.address = address


class Closed:
    """Event: a server has stopped listening."""

    def __init__(self, server):
        self.server = server


class IClientCache(zope.interface.Interface):
    """The cache of a ``ClientStorage``. Oids and tids are 8 bytes; an end tid of ``None`` means "current"."""

    def close():
        """Release everything it holds."""

    def load(oid):
        """The current revision as ``(data, tid)``, or ``None``."""

    def __len__():
        """Number of cached revisions."""

    def store(oid, start_tid, end_tid, data):
        """Remember a revision that was current from ``start_tid`` up to, not including, ``end_tid``."""

    def loadBefore(oid, tid):
        """The revision current just before ``tid`` as ``(data, start tid, end tid or None)``, or ``None``."""

    def invalidate(oid, tid):
        """The current revision ended at ``tid``; ``None``: forget it."""

    def getLastTid():
        """The last tid that the cache reflects, or ``None``."""

    def setLastTid(tid):
        """Move the last tid forward. ``ValueError`` if it would go back while objects are cached."""

    def clear():
        """Forget every object."""


class IServeable(zope.interface.Interface):
    """What a storage may offer a server beyond ``IStorage``."""

    def tpc_transaction():
        """The transaction in progress, or ``None``."""

    def lastInvalidations(size):
        """The last ``size`` transactions, oldest first, as ``(tid, [oid, ...])``."""
