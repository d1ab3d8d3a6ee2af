"""What the server needs of a Python storage, in the shape that its adapter (``src/python/served_storage.rs``) calls.

Any ZODB storage can be served: MappingStorage, DemoStorage, zlibstorage, BlobStorage, RelStorage, a ClientStorage.
Oids, tids and data are ``bytes`` here; optional ones may be ``None``.
"""

import base64

import zope.interface
from ZODB.ConflictResolution import BadClass, ConflictResolvingStorage, _unresolvable, find_global
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IStorageUndoable
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.serialize import referencesf


class Served:
    """One storage behind the server. Called from worker threads; the server never votes two transactions at once."""

    def __init__(self, storage, clients_resolve):
        """``clients_resolve``: conflicts are not resolved by the storage but reported, for the client to resolve."""
        self.storage = storage
        self.clients_resolve = clients_resolve
        if clients_resolve:
            storage.tryToResolveConflict = _conflict

    def subscribe(self, sink):
        """``sink`` has ``invalidate(tid, oids)`` and ``invalidate_all()``: news that come from below the storage."""
        self.storage.registerDB(_Database(sink))

    def capabilities(self):
        storage = self.storage
        undo = IStorageUndoable.providedBy(storage) or _says_yes(storage, 'supportsUndo')
        return {
            'undo': undo,
            'record_iternext': hasattr(storage, 'record_iternext'),
            'delete_object': hasattr(storage, 'deleteObject'),
            'restore': hasattr(storage, 'restore'),
            'blobs': IBlobStorage.providedBy(storage),
            'interfaces': [(i.__module__, i.__name__) for i in zope.interface.providedBy(storage).__iro__],
        }

    def failure(self):
        """Why nothing can be written now, or ``None``: a ClientStorage knows whether it has a server."""
        is_connected = getattr(self.storage, 'is_connected', None)
        if is_connected is not None and not is_connected():
            return 'it is not connected to its server'
        return None

    def vote(self, user, description, extension, tid, status, operations):
        """Runs ``tpc_begin`` to ``tpc_vote``; aborts on an error. Returns ``(transaction, written, resolved)``, or the
        list of conflicts ``(oid, committed, read, data)`` for the client to resolve.

        ``operations`` are tuples ``(name, arguments...)``, see the adapter.
        """
        transaction = TransactionMetaData(user, description, extension)
        storage = self.storage
        if tid is None and status == ' ':
            storage.tpc_begin(transaction)
        else:
            storage.tpc_begin(transaction, tid, status)
        try:
            written, resolved, conflicts = [], [], {}
            for name, *arguments in operations:
                try:
                    oids, changed = getattr(self, '_' + name)(transaction, *arguments)
                except ConflictError as error:
                    if name != 'store' or not self.clients_resolve or not error.serials:
                        raise
                    oid, _, data, _ = arguments
                    conflicts[oid] = (oid, *error.serials, data)
                    continue
                written += oids
                resolved += changed
                for oid in oids:
                    conflicts.pop(oid, None)
            if conflicts:
                storage.tpc_abort(transaction)
                return list(conflicts.values())
            resolved += storage.tpc_vote(transaction) or ()
        except BaseException:
            storage.tpc_abort(transaction)
            raise
        # what a storage resolves or undoes only in its vote (a ClientStorage) is written as well
        written = list(dict.fromkeys([*written, *resolved]))
        return transaction, written, list(dict.fromkeys(resolved))

    def _store(self, transaction, oid, serial, data, blob):
        if blob is None:
            self.storage.store(oid, serial, data, '', transaction)
        else:
            self.storage.storeBlob(oid, serial, data, blob, '', transaction)
        return [oid], []

    def _check(self, transaction, oid, serial):
        self.storage.checkCurrentSerialInTransaction(oid, serial, transaction)
        return [], []

    def _delete(self, transaction, oid, serial):
        self.storage.deleteObject(oid, serial, transaction)
        return [oid], []

    def _restore(self, transaction, oid, serial, data, prev_txn, blob):
        if blob is None:
            self.storage.restore(oid, serial, data, '', prev_txn, transaction)
        else:
            self.storage.restoreBlob(oid, serial, data, blob, prev_txn, transaction)
        return [oid], []

    def _undo(self, transaction, tid):
        result = self.storage.undo(base64.encodebytes(tid).rstrip(), transaction)
        oids = list(result[1]) if result else []
        return oids, oids

    def finish(self, transaction):
        return self.storage.tpc_finish(transaction)

    def abort(self, transaction):
        self.storage.tpc_abort(transaction)

    def history(self, oid, size):
        """``(tid, size, user, description, extension dict)`` of each revision."""
        return [
            (
                entry.get('tid') or entry.get('serial'),
                entry.get('size', 0),
                _bytes(entry.get('user_name', b'')),
                _bytes(entry.get('description', b'')),
                _extension(entry, 'time', 'user_name', 'description', 'tid', 'serial', 'size', 'extension'),
            )
            for entry in self.storage.history(oid, size)
        ]

    def undo_log(self, first, last):
        return [
            (
                base64.decodebytes(_bytes(entry['id']) + b'\n'),
                entry.get('size', 0),
                _bytes(entry.get('user_name', b'')),
                _bytes(entry.get('description', b'')),
                _extension(entry, 'id', 'time', 'user_name', 'description', 'size'),
            )
            for entry in self.storage.undoLog(first, last)
        ]

    def iterate(self, start, stop):
        """Iterator of ``(tid, status, user, description, extension pickle, record iterator)``."""
        for txn in self.storage.iterator(start, stop):
            records = ((r.oid, r.tid, r.data, r.data_txn) for r in txn)
            yield txn.tid, txn.status, _bytes(txn.user), _bytes(txn.description), _extension_bytes(txn), records

    def record_iternext(self, oid):
        """As the storage's, but skips objects that do not exist, and ``None`` at the end."""
        while True:
            try:
                return self.storage.record_iternext(oid)
            except ValueError:
                return None
            except POSKeyError:
                if oid is None:
                    raise
                oid = (int.from_bytes(oid, 'big') + 1).to_bytes(8, 'big')

    def last_invalidations(self, count):
        get = getattr(self.storage, 'lastInvalidations', None)
        if get is None:
            return None
        return [(tid, list(oids)) for tid, oids in get(count)]

    def pack(self, time, gc):
        """``gc`` is ``None`` for the storage's own choice."""
        if gc is None:
            self.storage.pack(time, referencesf)
        else:
            self.storage.pack(time, referencesf, gc=gc)

    def blob_path(self, oid, serial):
        return self.storage.loadBlob(oid, serial)

    def temporary_directory(self):
        return self.storage.temporaryDirectory()

    def blob_oid_directory(self, oid):
        return self.storage.fshelper.getPathForOID(oid, create=True)


class _Database:
    """The object given to ``registerDB``: passes on what comes from below."""

    references = staticmethod(referencesf)

    def __init__(self, sink):
        self._sink = sink

    def invalidate(self, tid, oids, version=''):
        self._sink.invalidate(tid, list(oids))

    def invalidateCache(self):
        self._sink.invalidate_all()

    @staticmethod
    def transform_record_data(data):
        return data

    untransform_record_data = transform_record_data


def _conflict(oid, committedSerial, oldSerial, newpickle, committedData=b''):
    """Takes the place of a storage's ``tryToResolveConflict`` where clients resolve."""
    raise ConflictError(oid=oid, serials=(committedSerial, oldSerial), data=newpickle)


class _Revisions(ConflictResolvingStorage):
    """What ZODB's conflict resolution asks of a storage: ``loadSerial``."""

    def __init__(self, revisions):
        self._revisions = revisions

    def loadSerial(self, oid, serial):
        return self._revisions[serial]


def resolve(oid, committed, read, new_data, read_data, committed_data):
    """The record that merges the three states by ZODB's rules, or ``None``: the conflict stands."""
    revisions = _Revisions({read: read_data, committed: committed_data})
    try:
        return revisions.tryToResolveConflict(oid, committed, read, new_data, committed_data)
    except ConflictError:
        return None


def is_unresolvable(module, name):
    """Whether ZODB has found that this class never resolves conflicts, or cannot import it (it does not try again either)."""
    klass = find_global(module, name)
    return isinstance(klass, BadClass) or klass in _unresolvable


def _says_yes(storage, name):
    method = getattr(storage, name, None)
    return bool(method is not None and method())


def _bytes(text):
    return text.encode('utf-8') if isinstance(text, str) else text


def _extension(entry, *own_keys):
    extension = {key: value for key, value in entry.items() if key not in own_keys}
    extension.update(entry.get('extension') or {})
    return TransactionMetaData(b'', b'', extension).extension_bytes


def _extension_bytes(txn):
    given = getattr(txn, 'extension_bytes', None)
    if given is None:
        given = TransactionMetaData(b'', b'', txn.extension).extension_bytes
    return given
