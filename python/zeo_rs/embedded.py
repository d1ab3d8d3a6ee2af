"""`server()`: a server inside this process, or in a child, for tests and for trying things out."""

import os
import select
import subprocess
import sys
import tempfile
import warnings

from zeo_rs.config import EXTRA, load_server_text
from zeo_rs.serving import describe, start

#: Attributes of ZEO's own `ZEOConfig`, which concern its log.
ZEO_OPTIONS = ("log", "logpath", "loglevel")
#: Options of `zeo_conf` given as a dict.
OPTIONS = (
    "read_only",
    "invalidation_queue_size",
    "invalidation_age",
    "transaction_timeout",
    "pid_filename",
    "msgpack",
    "client_conflict_resolution",
    *EXTRA,
)


def server(
    path=None, blob_dir=None, storage_conf=None, zeo_conf=None, port=0, threaded=True, start_timeout=33, ssl=None, **kw
):
    """Start a server; answers `(address, stop)`.

    path, blob_dir: a file storage and its blobs. storage_conf: ZConfig text of storages instead. Neither: in memory.
    zeo_conf: ZConfig text of a `<zeo>` section, or a dict of its options. port: a number (0 or None: a free one), `(host, port)`, or
    a path for a unix socket. threaded=False: in a child process. ssl: a `zeo_rs.TLS` (threaded only).

    `address` is what `ClientStorage` takes; `stop()` ends the server. Of the keywords that ZEO's function passes on,
    `protocol` (`b"Z5"`, `b"M5"`: which one to announce), `show_config` (print the configuration) and, with a child process,
    `log` (True, or the path of its log) have their meaning; `name` and `debug` are accepted and have none.
    """
    protocol, log, show_config = kw.pop("protocol", None), kw.pop("log", None), kw.pop("show_config", False)
    unknown = set(kw) - {"name", "debug"}
    if unknown:
        raise TypeError(f"server() got unexpected keyword arguments: {', '.join(sorted(unknown))}")
    text = configuration(path, blob_dir, storage_conf, zeo_conf, port, protocol)
    if log and not threaded:
        text += f"<eventlog>\n  <logfile>\n    path {log if isinstance(log, str) else 'server.log'}\n  </logfile>\n</eventlog>\n"
    if show_config:
        print(text)
    if threaded:
        running = start_threaded(text, ssl)
        return running.address, lambda stop_timeout=99: running.stop()
    if ssl is not None:
        raise ValueError("ssl objects cannot be given to a child process: use an <ssl> section in zeo_conf")
    return _child(text, start_timeout)


def start_threaded(text, ssl=None):
    """A `Running` server in threads of this process. Sends `Serving`, and `Closed` when it is stopped."""
    settings = load_server_text(text)
    settings.tls = ssl or settings.tls
    settings.options["inherit"] = False
    return start(settings)


def configuration(path, blob_dir, storage_conf, zeo_conf, port, protocol=None):
    """ZConfig text of `server`'s arguments."""
    if zeo_conf is None or isinstance(zeo_conf, dict):
        options = dict(zeo_conf or {})
        if protocol is not None:
            options["msgpack"] = _is_msgpack(protocol)
        # what ZEO's ZEOConfig takes and makes nothing of, it does not refuse either
        unknown = set(options) - {*OPTIONS, *ZEO_OPTIONS, "address"}
        if unknown:
            warnings.warn(f"unknown options in zeo_conf are ignored: {', '.join(sorted(unknown))}", stacklevel=3)
        options = {name: value for name, value in options.items() if name in (*OPTIONS, "address")}
        address = options.pop("address", None) or port or 0
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
    return f"{zeo_conf}\n{storage_conf}\n"


def _is_msgpack(protocol):
    text = protocol.decode("latin-1") if isinstance(protocol, bytes) else protocol
    if text not in ("M5", "Z5"):
        raise ValueError(f"protocol {protocol!r} is not spoken: give b'M5' or b'Z5'")
    return text == "M5"


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
