"""Real peers as processes: servers (ZEO's runzeo, ours) and clients (ZEO's ClientStorage, ours) driven over a pipe."""

import base64
import contextlib
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
KINDS = ("zeo", "rust")
ENCODINGS = ("Z5", "M5")
START = 60  # seconds that a process may take to come up on a loaded machine
ZEO_STOP = 10  # seconds that ZEO's server may take to end


def free_port():
    """A port that nobody has now, and that the system gives to nobody who does not ask for it by number.

    For servers that cannot tell which port they got, or that have to come back on the same one: the system hands the ports
    it chooses itself, above these, to every connection made meanwhile.
    """
    while True:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", random.randrange(10_000, 32_000)))
            return sock.getsockname()[1]


def connect(address, timeout=START):
    """A plain socket to a server of either kind."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    sock.connect(address)
    return sock


class Server:
    """One server process on a Data.fs of its own; `address` as ClientStorage takes it."""

    MODULES = {"zeo": "ZEO.runzeo", "rust": "zeo_rs.runzeo"}

    def __init__(self, kind, encoding="M5", unix=False, blobs=True, storages=("1",), options="", directory=None):
        self.kind, self.encoding = kind, encoding
        self._own = directory is None
        # a socket's path is limited to some hundred bytes, which pytest's directories exceed
        self.directory = Path(directory or tempfile.mkdtemp(prefix="zeo"))
        self.address = str(self.directory / "sock") if unix else ("127.0.0.1", free_port())
        address = self.address if unix else "%s:%s" % self.address
        config = [f"<zeo>\n  address {address}\n  msgpack {'true' if encoding == 'M5' else 'false'}\n  {options}\n</zeo>"]
        for name in storages:
            blob_dir = f"  blob-dir {self.directory}/blobs-{name}\n" if blobs else ""
            config.append(f"<filestorage {name}>\n  path {self.data_fs(name)}\n{blob_dir}</filestorage>")
        config.append(
            f"<eventlog>\n  level info\n  <logfile>\n    path {self.directory}/log\n  </logfile>\n</eventlog>"
        )
        self.config = self.directory / "zeo.conf"
        self.config.write_text("\n".join(config))
        self.process = None
        self.start()

    def data_fs(self, name="1"):
        return self.directory / f"Data-{name}.fs"

    def log(self):
        path = self.directory / "log"
        return path.read_text() if path.exists() else ""

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.MODULES[self.kind], "-C", str(self.config)],
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / "output").open("ab"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + START
        while True:
            try:
                with connect(self.address) as sock:
                    # the greeting comes when the server is at work, a connection already when it listens
                    if sock.recv(1):
                        return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                output = (self.directory / "output").read_text()
                self.kill()
                raise AssertionError(f"{self.kind} server did not start:\n{output}\n{self.log()}")
            time.sleep(0.05)

    def stop(self):
        """Ends it as an operator does; returns the exit status.

        ZEO's own server now and then does not end on SIGTERM while a client is connected: that one is killed. However it
        ends, it counts as ended well, because it is not what is tested here.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        if self.kind != "zeo":
            return self.process.wait(START)
        try:
            self.process.wait(ZEO_STOP)
        except subprocess.TimeoutExpired:
            self.kill()
        return 0

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(START)

    def close(self):
        try:
            if self.process.poll() is None:
                self.stop()
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            if self._own:
                shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class RemoteError(Exception):
    """An exception in a client process; `kinds` are the names of its class and bases."""

    def __init__(self, kinds, text):
        super().__init__(f"{kinds[0]}: {text}")
        self.kinds, self.text = kinds, text


class Client:
    """A client process. Methods are those of `worker.Worker`; `send`/`receive` let several run at once."""

    def __init__(self, kind, address, **options):
        self.kind = kind
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            self.call("connect", address, **options)
        except BaseException:
            self.close()
            raise

    def send(self, method, *args, **kw):
        line = base64.b64encode(pickle.dumps((method, args, kw)))
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def receive(self):
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the {self.kind} client process died: {self.process.wait()}")
        ok, value = pickle.loads(base64.b64decode(line))
        if ok:
            return value
        raise RemoteError(*value)

    def call(self, method, *args, **kw):
        self.send(method, *args, **kw)
        return self.receive()

    def __getattr__(self, method):
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args, **kw: self.call(method, *args, **kw)

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(START)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class Proxy:
    """Between clients and a server: breaks connections, and the next ones until it is restored; holds up answers."""

    def __init__(self, target):
        self._target, self._sockets, self._lock = target, [], threading.Lock()
        self._is_cut = False
        self._lets_pass = threading.Event()
        self._lets_pass.set()
        #: Bytes that clients have sent.
        self.sent = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._is_cut:
                    near.close()
                    continue
                far = connect(self._target, None)
                self._sockets += near, far
            for pair in (near, far), (far, near):
                threading.Thread(target=self._copy, args=(*pair, pair[0] is near), daemon=True).start()

    def _copy(self, source, target, upwards):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if upwards:
                    self.sent += len(data)
                else:
                    self._lets_pass.wait()
                target.sendall(data)
        for sock in source, target:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self):
        with self._lock:
            self._is_cut = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            self._sockets = []

    def restore(self):
        self._is_cut = False

    def hold(self):
        """From now on the server's answers wait for `release`."""
        self._lets_pass.clear()

    def release(self):
        self._lets_pass.set()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.release()
        self._listener.close()
        self.cut()
