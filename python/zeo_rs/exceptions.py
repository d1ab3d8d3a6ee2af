"""Exceptions of the client."""

import transaction.interfaces
from ZODB.POSException import StorageError


class ClientStorageError(StorageError):
    """An error of a client."""


class UnrecognizedResult(ClientStorageError):
    """The server answered what the protocol does not allow."""


class ClientDisconnected(ClientStorageError, transaction.interfaces.TransientError):
    """There is no connection to the server, or it was lost; the transaction can be tried again."""


class ProtocolError(ClientStorageError):
    """The server speaks another protocol."""


class ServerException(ClientStorageError):
    """The server answered with an error of a class that clients do not know: its name and its arguments."""
