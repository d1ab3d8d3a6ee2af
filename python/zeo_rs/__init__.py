"""ZEO, the client-server storage of ZODB, in Rust for Python."""

from importlib import import_module

from zeo_rs._zeo import __version__

__all__ = ["DB", "ClientStorage", "FileStorage", "TLS", "__version__", "client", "connection", "resolve_uri", "server"]

# imported when asked for: a client process has no use for the server and the storage engine
_WHERE = {
    "ClientStorage": "zeo_rs.clientstorage",
    "FileStorage": "zeo_rs.filestorage",
    "TLS": "zeo_rs.tls",
    "DB": "zeo_rs.shortcuts",
    "client": "zeo_rs.shortcuts",
    "connection": "zeo_rs.shortcuts",
    "server": "zeo_rs.embedded",
    "resolve_uri": "zeo_rs.uri",
}


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
