"""Exceptions that ZODB has no single class for."""

from ZODB.FileStorage.FileStorage import CorruptedTransactionError
from ZODB.FileStorage.format import CorruptedDataError


class CorruptedFileError(CorruptedTransactionError, CorruptedDataError):
    """A Data.fs contradicts its format at a position.

    ZODB raises one of the two base classes, depending on which of its methods stumbled over the damage.
    """

    def __init__(self, message, pos=None):
        Exception.__init__(self, message)
        self.oid = self.buf = None
        self.pos = pos

    def __str__(self):
        return self.args[0]
