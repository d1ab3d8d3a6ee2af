"""``zeo://`` URIs, with the query parameters of zodburi's; and what the command line takes for a storage.

``zeo://HOST:PORT?storage=main&wait_timeout=5``, ``zeo://[::1]:9100``, ``zeo:///path/of/a/socket?cache_size=100MB``. The port is 9991
if it is not given. Several servers of the same data: ``server=HOST:PORT``, repeated, beside the first one.

zodburi itself finds this resolver for ``zeo-rs://``. Its own for ``zeo://`` makes whatever ``ZEO.ClientStorage`` is: this project's
after ``import zeo_rs.zeo``.
"""

import os
import urllib.parse
from types import SimpleNamespace

from zeo_rs.config import client_address

#: zodburi's; ZEO has given this meaning to it since it was called ZEO.
DEFAULT_PORT = 9991

_TRUE = {"1", "on", "true", "t", "yes"}
_FALSE = {"", "0", "off", "false", "f", "no"}
_UNITS = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


def _number(text):
    """As zodburi: a word for true or false is a number too."""
    text = text.lower()
    return 1 if text in _TRUE else 0 if text in _FALSE else int(text)


def _bytes(text):
    text = text.strip().lower()
    unit = _UNITS.get(text[-2:])
    return int(text) if unit is None else int(text[:-2]) * unit


#: Parameters of ``ClientStorage`` and how their text is read.
PARAMETERS = {
    **dict.fromkeys(
        (
            "min_disconnect_poll",
            "max_disconnect_poll",
            "wait",
            "wait_timeout",
            "read_only",
            "read_only_fallback",
            "shared_blob_dir",
            "drop_cache_rather_verify",
            "blob_cache_size_check",
            "server_sync",
        ),
        _number,
    ),
    **dict.fromkeys(
        (
            "storage",
            "name",
            "client",
            "var",
            "cache",
            "cache_trace",
            "username",
            "password",
            "realm",
            "blob_dir",
            "client_label",
            "ssl_server_hostname",
        ),
        str,
    ),
    "cache_size": _bytes,
    "blob_cache_size": _bytes,
}
#: Keys of an ``<ssl>`` section, with ``ssl_`` before them. Any of them means TLS.
_SSL = {"certificate": None, "key": None, "password_function": None, "authenticate": None, "check_hostname": True}

#: Parameters of ``ZODB.DB`` as zodburi calls them.
DATABASE = {
    "database_name": ("database_name", str),
    **{
        f"connection_{name}": (name, read)
        for name, read in {
            "pool_size": int,
            "pool_timeout": int,
            "cache_size": int,
            "cache_size_bytes": _bytes,
            "historical_pool_size": int,
            "historical_cache_size": int,
            "historical_cache_size_bytes": _bytes,
            "historical_timeout": int,
            "large_record_size": _bytes,
        }.items()
    },
}


def resolve_uri(uri):
    """``(factory, keywords)``: a function that opens the storage, and the keyword arguments for ``ZODB.DB``.

    Raises ``ValueError`` for what is no ``zeo://`` URI and for values that cannot be read, ``KeyError`` for unknown parameters.
    """
    factory, rest = resolver(uri)
    keywords = {"cache_size": 10000, "pool_size": 7, "database_name": "unnamed"}
    for name in list(rest):
        if name in DATABASE:
            target, read = DATABASE[name]
            keywords[target] = _read(name, read, rest.pop(name))
    if rest:
        raise KeyError(f"unknown parameters in a zeo:// URI: {', '.join(sorted(rest))}")
    return factory, keywords


def resolver(uri):
    """``(factory, parameters that are not the storage's)``: zodburi's protocol."""
    scheme, colon, rest = uri.partition("://")
    if not colon or scheme.lower() not in ("zeo", "zeo-rs"):
        raise ValueError(f"{uri!r}: a URI of a ZEO server is zeo://HOST:PORT or zeo:///PATH")
    parts = urllib.parse.urlsplit(f"http://{rest}")
    if parts.fragment:
        raise ValueError(f"{uri!r}: what comes after # means nothing here")
    if parts.netloc:
        if parts.path not in ("", "/") or "@" in parts.netloc:
            raise ValueError(f"{uri!r}: a host has no path or user; the storage's name is given as ?storage=NAME")
        addresses = [(parts.hostname, parts.port or DEFAULT_PORT)]
    elif parts.path:
        addresses = [os.path.normpath(urllib.parse.unquote(parts.path))]
    else:
        raise ValueError(f"{uri!r}: neither a host nor a path")
    pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    addresses += [client_address(value) for name, value in pairs if name == "server"]
    given = {name: value for name, value in pairs if name != "server"}
    given.pop("debug", None)  # of long ago
    if "wait_for_server_on_startup" in given:  # the old name
        given.setdefault("wait", given.pop("wait_for_server_on_startup"))
    demo = "demostorage" in given and bool(_number(given.pop("demostorage") or "1"))
    options = {name: _read(name, PARAMETERS[name], given.pop(name)) for name in list(given) if name in PARAMETERS}
    for flag in ("wait", "server_sync"):
        if flag in options:
            options[flag] = bool(options[flag])
    _tls(given, options)

    def factory():
        from zeo_rs.clientstorage import ClientStorage

        storage = ClientStorage(addresses, **options)
        if not demo:
            return storage
        from ZODB.DemoStorage import DemoStorage

        return DemoStorage(base=storage)

    return factory, given


def _tls(given, options):
    section = {key: given.pop(f"ssl_{key}", default) for key, default in _SSL.items()}
    if section == _SSL:
        if "ssl_server_hostname" in options:
            raise ValueError("ssl_server_hostname without ssl_authenticate or ssl_certificate: that would not be TLS")
        return
    from zeo_rs.tls import client_ssl

    if isinstance(section["check_hostname"], str):
        section["check_hostname"] = bool(_read("ssl_check_hostname", _number, section["check_hostname"]))
    server = options.get("ssl_server_hostname")
    options["ssl"], options["ssl_server_hostname"] = client_ssl(SimpleNamespace(server_hostname=server, **section))


def _read(name, read, text):
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{name}={text}: {error}") from error


def open_storage(text, blob_dir=None, read_only=False, create=False):
    """The storage that ``text`` names: a ``zeo://`` URI, a configuration file (``*.conf``, with one storage or, after ``#``, the
    name of one of several), or else the path of a Data.fs.

    Raises ``ValueError`` saying what is wrong with the text; and what opening raises.
    """
    if text.partition("://")[0] in ("zeo", "zeo-rs"):
        factory, rest = resolver(_with(text, blob_dir=blob_dir, read_only=int(read_only) or None))
        if rest:
            raise ValueError(f"{text}: unknown parameters {', '.join(sorted(rest))}")
        return factory()
    path, _, name = text.partition("#")
    if path.endswith((".conf", ".zcml", ".cfg")):
        if blob_dir:
            raise ValueError(f"{text}: its blob directory is said in the file")
        return _configured(path, name)
    if not create and not os.path.exists(text):
        raise ValueError(f"no such file: {text}")
    from zeo_rs.filestorage import FileStorage

    return FileStorage(text, blob_dir=blob_dir, read_only=read_only)


def _with(uri, **parameters):
    """The URI with parameters that it does not say itself."""
    known = {name for name, _ in urllib.parse.parse_qsl(uri.partition("?")[2], keep_blank_values=True)}
    more = {name: value for name, value in parameters.items() if value is not None and name not in known}
    if not more:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}{urllib.parse.urlencode(more)}"


def _configured(path, name):
    import io

    import ZConfig

    schema = ZConfig.loadSchemaFile(
        io.StringIO(
            '<schema><import package="ZODB"/><multisection type="ZODB.storage" name="*" attribute="storages"/></schema>'
        )
    )
    config, _ = ZConfig.loadConfig(schema, path)
    found = [factory for factory in config.storages if not name or factory.name == name]
    if len(found) != 1:
        names = ", ".join(factory.name or "(no name)" for factory in config.storages)
        raise ValueError(f"{path}: {'no storage' if not found else 'several storages'}; it has: {names}; choose with #NAME")
    return found[0].open()
