"""`storage._index` for the tools that look into a FileStorage: a mapping of oids to file positions, ordered by oid."""

from collections.abc import Mapping

from ZODB.fsIndex import fsIndex
from ZODB.utils import p64, u64, z64

MAX_OID = b"\xff" * 8


class FileIndex(Mapping):
    """Read-only view of the engine's index, with the methods of ZODB's `fsIndex`."""

    def __init__(self, storage):
        self._get, self._from, self._max = storage._index_get, storage._index_from, storage._index_max
        self._len = storage.__len__

    def __getitem__(self, oid):
        position = self._get(oid)
        if position is None:
            raise KeyError(oid)
        return position

    def get(self, oid, default=None):
        position = self._get(oid)
        return default if position is None else position

    def __contains__(self, oid):
        return self._get(oid) is not None

    def __len__(self):
        return self._len()

    def __iter__(self):
        for oid, _ in self.iteritems():
            yield oid

    iterkeys = __iter__

    def iteritems(self):
        oid = z64
        while (found := self._from(oid)) is not None:
            yield found
            if found[0] == MAX_OID:
                return
            oid = p64(u64(found[0]) + 1)

    def itervalues(self):
        for _, position in self.iteritems():
            yield position

    def keys(self):
        return list(self)

    def items(self):
        return list(self.iteritems())

    def values(self):
        return list(self.itervalues())

    def minKey(self, key=None):
        found = self._from(z64 if key is None else key)
        if found is None:
            raise ValueError("empty tree" if key is None else "no key satisfies the conditions")
        return found[0]

    def maxKey(self, key=None):
        if key is not None:
            raise TypeError("maxKey of a bound is not supported")
        oid = self._max()
        if oid is None:
            raise ValueError("empty tree")
        return oid

    def save(self, pos, fname):
        """Writes an index file (repozo keeps one with each backup)."""
        index = fsIndex()
        index.update(dict(self.iteritems()))
        index.save(pos, fname)
