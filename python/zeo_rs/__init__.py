"""ZEO, the client-server storage of ZODB, in Rust for Python."""

import sys
import warnings
from importlib import import_module, metadata


def _refuse_other_interpreters():
    """The native half belongs to one interpreter, and its threads call back into it: in another one they would deadlock."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # since 3.13; before
        try:
            interpreters = import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "zeo_rs works in the main interpreter of a process only, this is a sub-interpreter."
                " Under mod_wsgi: WSGIApplicationGroup %{GLOBAL}"
            )
        return


_refuse_other_interpreters()

from zeo_rs._zeo import __version__  # noqa: E402

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


def _warn_of_persistent(version, python):
    """`persistent` up to 6.1.1 loses invalidations on Python 3.14: objects stay as they were, whatever the storage."""
    if python >= (3, 14) and tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) <= (6, 1, 1):
        text = f"persistent {version} loses invalidations on Python {python[0]}.{python[1]}: install a newer one"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


if sys.version_info >= (3, 14):
    _warn_of_persistent(metadata.version("persistent"), sys.version_info[:2])
