"""Configuration: ZConfig's sections of servers and storages made into what the rest of the package takes."""

import importlib
import io
import os
from dataclasses import dataclass, field

import ZConfig
import ZConfig.datatypes
import ZConfig.loader
import ZODB.config

from zeo_rs.tls import client_ssl, server_ssl

#: Keys of old releases of ZEO. They never gave, or no longer give, what their names promise.
LEGACY = (
    "monitor_address",
    "authentication_protocol",
    "authentication_database",
    "authentication_realm",
    "auth_protocol",
    "auth_database",
    "auth_realm",
)


#: Keys that ZEO does not have, and the server's options that they set.
EXTRA = {
    "http_address": "http",
    "slow_operation": "slow_operation",
    "max_connections": "max_connections",
    "max_frame_size": "max_frame",
    "max_transaction_size": "max_staged",
    "max_iterators": "max_cursors",
    "load_threads": "load_threads",
    "local_socket": "local_socket",
    "shared_cache_size": "shared_cache_size",
    "max_unread_invalidations": "max_unread",
    "handshake_timeout": "handshake_timeout",
    "peer_timeout": "peer_timeout",
    "staging_memory": "staging_memory",
    "staging_directory": "staging_directory",
}


class ConfigurationError(Exception):
    """Something in a configuration or on a command line is wrong; the text says what to do."""


# -- datatypes


def _address(text, no_host, no_port):
    """PORT, HOST, HOST:PORT, [IPV6]:PORT, or a path (anything with a slash)."""
    if "/" in text:
        return text
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = (no_host, text) if text.isdigit() else (text, no_port)
    if port is None:
        raise ValueError(f"{text!r}: an address is PORT, HOST:PORT, [IPV6]:PORT, or a path with a slash in it")
    try:
        port = int(port)
    except ValueError:
        port = -1
    if not 0 <= port < 65536:
        raise ValueError(f"{text!r}: the port must be a number from 0 to 65535")
    return host.strip("[]") or no_host, port


def server_address(text):
    return _address(text, "", 0)


def client_address(text):
    return _address(text, "127.0.0.1", None)


def seconds(text):
    """A time; not negative."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{text!r}: give a number of seconds, 0 or more")
    return value


def queue_size(text):
    """Of ``invalidation-queue-size``."""
    value = int(text)
    if value < 0:
        raise ValueError(f"invalidation-queue-size {text}: give a number of transactions, 0 or more")
    return value


def at_least_zero(text):
    value = int(text)
    if value < 0:
        raise ValueError(f"{text!r}: give a number, 0 or more")
    return value


def shared_cache_size(text):
    try:
        size = ZConfig.datatypes.stock_datatypes["byte-size"](text)
    except ValueError:
        size = -1
    if size != 0 and not 1 << 20 <= size <= 1 << 40:
        raise ValueError(f"{text!r}: give 0 (none), or 1MB to 1024GB")
    return size


def at_least_one(text):
    value = int(text)
    if value < 1:
        raise ValueError(f"{text!r}: give a number, 1 or more")
    return value


class SSLSection:
    """An `<ssl>` section, to be interpreted by the section around it."""

    def __init__(self, section):
        for name in section.getSectionAttributes():
            setattr(self, name, getattr(section, name))


class ClientStorageFactory(ZODB.config.BaseConfig):
    """`<clientstorage>`"""

    def open(self):
        from zeo_rs.clientstorage import ClientStorage

        config = self.config
        options = {}
        if config.ssl is not None:
            options["ssl"], options["ssl_server_hostname"] = client_ssl(config.ssl)
        if config.blob_cache_size_check is not None:
            options["blob_cache_size_check"] = config.blob_cache_size_check
        return ClientStorage(
            config.servers,
            storage=config.storage,
            cache_size=config.cache_size,
            cache=config.cache_path,
            cache_trace=config.cache_trace,
            name=config.name,
            blob_dir=config.blob_dir,
            shared_blob_dir=config.shared_blob_dir,
            blob_cache_size=config.blob_cache_size,
            read_only=config.read_only,
            read_only_fallback=config.read_only_fallback,
            server_sync=config.server_sync,
            wait_timeout=config.wait_timeout,
            client_label=config.client_label,
            wait=True,
            **options,
        )


class FileStorageFactory(ZODB.config.BaseConfig):
    """`<rustfilestorage>`, and `<filestorage>` in a server's configuration."""

    def arguments(self):
        """Arguments of `zeo_rs.FileStorage`."""
        config = self.config
        names = ("create", "read_only", "quota", "pack_gc", "pack_keep_old", "blob_dir")
        given = {name: getattr(config, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def packer(self):
        """What the `packer` key names: `module.name`, or `module:expression`; None without it."""
        text = self.config.packer
        if not text:
            return None
        module, colon, expression = text.partition(":")
        if colon:
            return eval(expression, importlib.import_module(module).__dict__)
        module, _, name = text.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def open(self):
        from zeo_rs.filestorage import FileStorage

        return FileStorage(self.config.path, packer=self.packer(), **self.arguments())


def _with_engine(factory):
    """The factory, with every `<filestorage>` in it opened by this package's engine."""
    if type(factory) is ZODB.config.FileStorage:
        return FileStorageFactory(factory.config)
    config = getattr(factory, "config", None)
    if config is None:
        return factory
    for name in config.getSectionAttributes():
        value = getattr(config, name)
        if isinstance(value, ZODB.config.BaseConfig):
            setattr(config, name, _with_engine(value))
        elif isinstance(value, list):
            setattr(config, name, [_with_engine(v) if isinstance(v, ZODB.config.BaseConfig) else v for v in value])
    return factory


# -- servers


@dataclass
class ServerSettings:
    """What a server is started with, from a file, a command line, or both."""

    addresses: list = field(default_factory=list)
    #: (name, factory), a factory having open()
    storages: list = field(default_factory=list)
    #: options of `_zeo.Server`
    options: dict = field(default_factory=dict)
    pid_filename: str | None = None
    #: ZConfig's factory of the `<eventlog>` section
    eventlog: object = None
    tls: object = None
    warnings: list = field(default_factory=list)


def schema():
    with open(os.path.join(os.path.dirname(__file__), "schema.xml")) as file:
        return ZConfig.loadSchemaFile(file)


def load_server(source, overrides=()):
    """`ServerSettings` of a configuration: a path, a URL or an open file; `overrides` as `KEY=VALUE`.

    Raises `ConfigurationError`.
    """
    try:
        if hasattr(source, "read"):
            loaded, _ = ZConfig.loadConfigFile(schema(), source, overrides=overrides)
        else:
            loaded, _ = ZConfig.loadConfig(schema(), source, overrides)
    except ZConfig.ConfigurationError as error:
        raise ConfigurationError(f"configuration: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration: {error}") from error
    zeo = loaded.zeo
    settings = ServerSettings(addresses=zeo.addresses, pid_filename=zeo.pid_filename, eventlog=loaded.eventlog)
    for key in LEGACY:
        if getattr(zeo, key) is not None:
            settings.warnings.append(
                f"the key {key.replace('_', '-')} is ignored and gives no security: the protocol has no authentication;"
                " use an <ssl> section with client certificates"
            )
    msgpack = zeo.msgpack if zeo.msgpack is not None else bool(os.environ.get("ZEO_MSGPACK"))
    settings.options = {
        "read_only": zeo.read_only,
        "invalidation_queue_size": zeo.invalidation_queue_size,
        "client_conflict_resolution": zeo.client_conflict_resolution,
        "msgpack": msgpack,
    }
    for name, option in {"invalidation_age": "invalidation_age", "transaction_timeout": "transaction_timeout", **EXTRA}.items():
        if getattr(zeo, name) is not None:
            settings.options[option] = getattr(zeo, name)
    settings.options["inherit"] = is_activated()
    if not (zeo.addresses or settings.options["inherit"]):
        raise ConfigurationError("configuration: <zeo> has no address to listen on")
    if zeo.ssl is not None:
        try:
            settings.tls = server_ssl(zeo.ssl)
        except (ValueError, OSError) as error:
            # of an OSError its text, without the number
            raise ConfigurationError(f"<ssl>: {getattr(error, 'strerror', None) or error}") from error
    for factory in loaded.storages:
        # a factory of another package need not keep its section
        packer = getattr(getattr(factory, "config", None), "packer", None)
        if packer:
            settings.warnings.append(f"packer {packer} is not used: the storage packs by itself")
    settings.storages = name_storages([_with_engine(factory) for factory in loaded.storages])
    return settings


def is_activated():
    """Whether systemd started this process with its listening sockets."""
    return os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS", "0") != "0"


def load_server_text(text):
    return load_server(io.StringIO(text))


def name_storages(factories):
    """`(name, factory)` of each; the unnamed one is `1`."""
    unnamed = [factory for factory in factories if not factory.name]
    names = [factory.name or "1" for factory in factories]
    if len(unnamed) > 1:
        raise ConfigurationError("more than one storage has no name; give each one: <filestorage NAME>")
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        why = " (the unnamed storage is called 1)" if unnamed and "1" in double else ""
        raise ConfigurationError(f"two storages are called {', '.join(double)}{why}")
    return list(zip(names, factories, strict=True))


def server_storage(factory):
    """What `_zeo.Server` takes for a factory: the engine natively, anything else as an open Python storage."""
    if isinstance(factory, FileStorageFactory):
        return ("filestorage", factory.config.path, factory.arguments())
    return factory.open()
