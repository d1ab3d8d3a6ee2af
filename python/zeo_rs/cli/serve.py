"""`zeo-rs serve`, and `python -m zeo_rs.runzeo` with the same options."""

import os
import sys
from types import SimpleNamespace

from zeo_rs.cli import fail
from zeo_rs.config import (
    ConfigurationError,
    FileStorageFactory,
    ServerSettings,
    is_activated,
    load_server,
    name_storages,
    seconds,
)
from zeo_rs.config import server_address as address_of


def arguments(parser):
    add = parser.add_argument
    add("-C", "--configure", metavar="FILE", help="configuration file or URL")
    add("-a", "--address", action="append", metavar="ADDRESS", help="PORT, HOST:PORT, [IPV6]:PORT, or a path")
    add("-f", "--filename", action="append", metavar="DATA.FS", help="a file storage; repeated: storages 1, 2, …")
    add("-t", "--timeout", type=float, metavar="SECONDS", help="transaction timeout")
    add("--pid-file", metavar="PATH", help="write the process id there")
    add("-X", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="overrides the configuration file")
    add("--test", action="store_true", help="start, then exit at once")
    add("--blob-dir", metavar="DIRECTORY", help="blob directory of the (only) --filename")
    add("--http", metavar="ADDRESS", help="answer operators over HTTP there: metrics, health, a status page")
    add("--slow-operation", metavar="SECONDS", help="log operations that take longer (1); 0: none")
    add("--json-log", action="store_true", help="log lines as JSON, without an <eventlog>")
    add("--ready-fd", type=int, metavar="FD", help="write the addresses there, one a line, when clients can connect")


def settings_of(args):
    """`ServerSettings`; the command line beats the file. Raises `ConfigurationError`."""
    if args.configure:
        settings = load_server(args.configure, args.overrides)
    elif args.overrides:
        raise ConfigurationError("-X overrides a configuration file: give one with -C")
    else:
        settings = ServerSettings()
        settings.options["inherit"] = is_activated()
        if os.environ.get("ZEO_MSGPACK"):
            settings.options["msgpack"] = True
    if args.address:
        try:
            settings.addresses = [address_of(text) for text in args.address]
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
    if args.filename:
        if args.blob_dir and len(args.filename) > 1:
            raise ConfigurationError("--blob-dir is for one --filename; use a configuration file for several")
        files = [file_storage(path, args.blob_dir, number) for number, path in enumerate(args.filename, 1)]
        settings.storages = name_storages(files)
    elif args.blob_dir:
        raise ConfigurationError("--blob-dir is for --filename; the configuration file names its own")
    if not (settings.addresses or settings.options["inherit"]):
        raise ConfigurationError("no address to listen on: give -a ADDRESS or -C FILE")
    if not settings.storages:
        raise ConfigurationError("no storage to serve: give -f DATA.FS or -C FILE")
    if args.http:
        try:
            settings.options["http"] = address_of(args.http)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
    if args.slow_operation is not None:
        try:
            settings.options["slow_operation"] = seconds(args.slow_operation)
        except ValueError as error:
            raise ConfigurationError(f"--slow-operation: {error}") from error
    if args.timeout is not None:
        settings.options["transaction_timeout"] = args.timeout
    if args.pid_file:
        settings.pid_filename = args.pid_file
    elif settings.pid_filename is None and os.environ.get("INSTANCE_HOME"):
        settings.pid_filename = os.path.join(os.environ["INSTANCE_HOME"], "var", "ZEO.pid")
    return settings


def file_storage(path, blob_dir, number):
    section = SimpleNamespace(
        path=path,
        blob_dir=blob_dir,
        create=None,
        read_only=None,
        quota=None,
        pack_gc=None,
        pack_keep_old=None,
        packer=None,
        getSectionName=lambda: str(number),
    )
    return FileStorageFactory(section)


def run(args):
    from zeo_rs import serving

    try:
        settings = settings_of(args)
        serving.set_up_logging(settings, args.json_log)
        return serving.run(settings, args.test, ready_writer(args.ready_fd))
    except ConfigurationError as error:
        sys.stderr.flush()
        return fail(error)


def ready_writer(fd):
    if fd is None:
        return None

    def ready(addresses):
        from zeo_rs.serving import describe

        with os.fdopen(fd, "w") as file:
            file.writelines(describe(address) + "\n" for address in addresses)

    return ready
