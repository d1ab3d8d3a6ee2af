"""`server()`: a server inside this process, or in a child, for tests and for trying things out."""

import os
import select
import subprocess
import sys
import tempfile
import warnings

from zeo_rs.config import load_server_text
from zeo_rs.serving import describe, start

#: Options of `zeo_conf` given as a dict.
OPTIONS = (
    "read_only",
    "invalidation_queue_size",
    "invalidation_age",
    "transaction_timeout",
    "pid_filename",
    "msgpack",
    "client_conflict_resolution",
    "staging_memory",
    "staging_directory",
)


def server(
    path=None, blob_dir=None, storage_conf=None, zeo_conf=None, port=0, threaded=True, start_timeout=33, ssl=None, **kw
):
    """Start a server; answers `(address, stop)`.

    path, blob_dir: a file storage and its blobs. storage_conf: ZConfig text of storages instead. Neither: in memory.
    zeo_conf: ZConfig text of a `<zeo>` section, or a dict of its options. port: a number (0: a free one), `(host, port)`, or
    a path for a unix socket. threaded=False: in a child process. ssl: a `zeo_rs.TLS` (threaded only).

    `address` is what `ClientStorage` takes; `stop()` ends the server. ZEO's keywords for its tests (`log`, `name`, `debug`,
    `show_config`, `protocol`) are accepted and mean nothing here.
    """
    ignored = set(kw) - {"log", "name", "debug", "show_config", "protocol"}
    if ignored:
        raise TypeError(f"server() got unexpected keyword arguments: {', '.join(sorted(ignored))}")
    text = _configuration(path, blob_dir, storage_conf, zeo_conf, port)
    if threaded:
        settings = load_server_text(text)
        settings.tls = ssl or settings.tls
        running = start(settings)
        return running.address, lambda stop_timeout=99: running.stop()
    if ssl is not None:
        raise ValueError("ssl objects cannot be given to a child process: use an <ssl> section in zeo_conf")
    return _child(text, start_timeout)


def _configuration(path, blob_dir, storage_conf, zeo_conf, port):
    if zeo_conf is None or isinstance(zeo_conf, dict):
        options = dict(zeo_conf or {})
        unknown = set(options) - {*OPTIONS, "address"}
        if unknown:
            raise TypeError(f"unknown options in zeo_conf: {', '.join(sorted(unknown))}")
        address = options.pop("address", None) or port
        if isinstance(address, int):
            address = ("127.0.0.1", address)
        lines = [f"address {describe(address)}"]
        lines += [f"{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None]
        zeo_conf = "<zeo>\n  %s\n</zeo>\n" % "\n  ".join(lines)
    if storage_conf is None:
        storage_conf = "<mappingstorage>\n</mappingstorage>" if path is None else f"<filestorage>\n  path {path}\n</filestorage>"
    if blob_dir is not None:
        storage_conf = f"<blobstorage>\n  blob-dir {blob_dir}\n{storage_conf}\n</blobstorage>"
        if path is not None:
            storage_conf = f"<filestorage>\n  path {path}\n  blob-dir {blob_dir}\n</filestorage>"
    return zeo_conf + storage_conf


def _child(text, start_timeout):
    with tempfile.NamedTemporaryFile("w", suffix=".conf", delete=False) as file:
        file.write(text)
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "zeo_rs.runzeo", "-C", file.name, "--ready-fd", str(writing)], pass_fds=[writing]
        )
    finally:
        os.close(writing)
    try:
        line = _first_line(reading, start_timeout)
    finally:
        os.close(reading)
        os.remove(file.name)
    if not line:
        process.kill()
        raise RuntimeError(f"the server did not start: exit status {process.wait()}")

    def stop(stop_timeout=99):
        process.terminate()
        try:
            process.wait(stop_timeout)
        except subprocess.TimeoutExpired:
            warnings.warn(f"the server did not stop in {stop_timeout} s and was killed", stacklevel=2)
            process.kill()
            process.wait()

    if "/" in line:
        return line, stop
    host, _, number = line.rpartition(":")
    return (host.strip("[]*") or "127.0.0.1", int(number)), stop


def _first_line(reading, timeout):
    if not select.select([reading], [], [], timeout)[0]:
        return ""
    with os.fdopen(os.dup(reading)) as file:
        return file.readline().strip()
