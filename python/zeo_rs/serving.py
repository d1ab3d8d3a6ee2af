"""A server: from settings to a running one; as a process its pid file, signals, log, and the end."""

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading

import ZODB.event

from zeo_rs import _zeo
from zeo_rs.config import ConfigurationError, server_storage
from zeo_rs.events import Closed, Serving
from zeo_rs.tls import server_tls

logger = logging.getLogger("zeo_rs.serving")


class Running:
    """A running server. `Serving` was sent when it is made; `stop()` sends `Closed`."""

    def __init__(self, server):
        self._server = server
        self._stopped = threading.Lock()
        #: `(host, port)` or a path; of several addresses, the first
        self.address = server.address
        self.addresses = server.addresses
        #: where operators are answered, or None
        self.http_address = server.http_address
        try:
            ZODB.event.notify(Serving(self, address=self.address))
        except BaseException:
            self.stop()
            raise

    def status(self):
        """`{storage: {name: value}}`, as the server tells monitors."""
        return json.loads(self._server.status())

    def stop(self):
        """Ends it in good order, storages included. Further calls do nothing."""
        if self._stopped.acquire(blocking=False):
            try:
                self._server.stop()
            finally:
                ZODB.event.notify(Closed(self))


def start(settings):
    """The settings as a `Running` server. Raises `ConfigurationError` for what an operator can put right."""
    # connecting to a socket that is handed to this process would only fill its queue
    inherited = set(inherited_paths()) if settings.options.get("inherit") else set()
    _check_addresses([address for address in settings.addresses if address not in inherited])
    storages = []
    try:
        for name, factory in settings.storages:
            try:
                storages.append((name, server_storage(factory)))
            except Exception as error:
                raise ConfigurationError(f"cannot open storage {name}: {error}") from error
        options = dict(settings.options)
        if settings.tls is not None:
            options["tls"] = server_tls(settings.tls)
        try:
            server = _zeo.Server(settings.addresses, storages, options)
        except Exception as error:
            raise ConfigurationError(_why(error)) from error
    except BaseException:
        for _, storage in storages:
            if not isinstance(storage, tuple):
                storage.close()
        raise
    return Running(server)


def inherited_paths():
    """Paths of the Unix sockets among those that systemd started this process with."""
    for number in range(3, 3 + int(os.environ["LISTEN_FDS"])):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as inherited:
            if inherited.family == socket.AF_UNIX:
                yield inherited.getsockname()


def _why(error):
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"address already in use: {text}"
    return text


def _check_addresses(addresses):
    """Refuses unix sockets that someone listens on; removes those that nobody does."""
    for address in addresses:
        if not isinstance(address, str) or not os.path.exists(address):
            continue
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(address)
            except ConnectionRefusedError:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(address)
            except OSError as error:
                raise ConfigurationError(f"{address} exists and is no socket to listen on: {error}") from error
            else:
                raise ConfigurationError(f"address already in use: a server listens on {address}")


def describe(address):
    return address if isinstance(address, str) else "%s:%s" % (address[0] or "*", address[1])


class PidFile:
    """Removed at the end if it is still ours. One that cannot be written is no reason not to serve."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "w") as file:
                file.write(f"{os.getpid()}\n")
        except OSError as error:
            logger.error("cannot write the pid file, and go on without: %s", error)
        else:
            logger.info("pid file %s", path)

    def remove(self):
        with contextlib.suppress(OSError, ValueError):
            with open(self.path) as file:
                ours = int(file.read()) == os.getpid()
            if ours:
                os.remove(self.path)


def notify(state):
    """Tells systemd (`Type=notify`), if it started us."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect("\0" + path[1:] if path[0] == "@" else path)
        sock.send(state.encode())


def run(settings, exit_at_once=False, ready=None):
    """Serves until SIGTERM or SIGINT. Answers the exit status.

    SIGUSR2 reopens log files, SIGHUP reads certificates again. `ready(addresses)` is called when clients can connect.
    """
    ended = threading.Event()
    # before anything is opened, so that an early signal ends in good order, too
    handled = {
        signal.SIGTERM: lambda *_: ended.set(),
        signal.SIGINT: lambda *_: ended.set(),
        signal.SIGHUP: lambda *_: _reload(settings),
        signal.SIGUSR2: lambda *_: _reopen_logs(settings),
    }
    for number, handler in handled.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for warning in settings.warnings:
        logger.warning(warning)
    logger.info("zeo-rs %s, process %s", _zeo.__version__, os.getpid())
    server = start(settings)
    pid_file = None
    try:
        if settings.pid_filename and not settings.options.get("read_only"):
            pid_file = PidFile(settings.pid_filename)
        notify("READY=1")
        if ready is not None:
            ready(server.addresses)
        if exit_at_once:
            print("testing exit immediately")
        else:
            while not ended.wait(60):
                pass
        logger.info("shutting down")
        notify("STOPPING=1")
    finally:
        # removes its own Unix sockets, too
        server.stop()
        if pid_file is not None:
            pid_file.remove()
        _zeo.flush_logs()
    return 0


def _reload(settings):
    if settings.tls is None:
        logger.info("SIGHUP: nothing to reload without TLS")
        return
    try:
        settings.tls.reload()
    except (OSError, ValueError) as error:
        logger.error("SIGHUP: the certificates stay as they were: %s", error)
    else:
        logger.info("SIGHUP: certificates read again")


def _reopen_logs(settings):
    if settings.eventlog is None:
        logger.warning("SIGUSR2: there are no log files to reopen")
        return
    _zeo.flush_logs()
    settings.eventlog.reopen()
    logger.info("log files reopened")


def set_up_logging(settings, json_lines=False):
    """The `<eventlog>`, or text (or JSON) on stderr."""
    if settings.eventlog is not None:
        settings.eventlog()
        return
    from zeo_rs.logformat import JSONFormatter

    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("------\n%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    handler.setFormatter(JSONFormatter() if json_lines else text)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
