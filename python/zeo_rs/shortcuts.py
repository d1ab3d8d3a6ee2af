"""`client`, `DB` and `connection`: one call from an address to a storage, a database, a connection."""

import ZODB

from zeo_rs.clientstorage import ClientStorage


def client(*args, **kw):
    """A `ClientStorage`; takes its arguments."""
    return ClientStorage(*args, **kw)


def DB(*args, **kw):
    """A `ZODB.DB` over a `ClientStorage`; takes the arguments of the latter."""
    storage = client(*args, **kw)
    try:
        return ZODB.DB(storage)
    except BaseException:
        storage.close()
        raise


def connection(*args, **kw):
    """An open connection to a database over a `ClientStorage`; closing it closes the database too."""
    database = DB(*args, **kw)
    try:
        return database.open_then_close_db_when_connection_closes()
    except BaseException:
        database.close()
        raise
