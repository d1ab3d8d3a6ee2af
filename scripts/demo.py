"""Starts a server on a Data.fs of its own, uses it as an application does, and leaves it running."""

import os
import pathlib
import subprocess
import sys

import ZODB
from persistent.mapping import PersistentMapping

import zeo_rs

#: Seconds that the server may take to listen.
PATIENCE = 30


def start(directory):
    """The server's process and its address."""
    log = open(directory / "server.log", "a")
    ready, writer = os.pipe()
    # a session of its own: it stays when this terminal goes
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "zeo_rs.cli", "serve"),
            *("--address", "127.0.0.1:0"),
            *("--filename", directory / "Data.fs", "--blob-dir", directory / "blobs"),
            *("--pid-file", directory / "server.pid", "--ready-fd", str(writer)),
        ],
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        pass_fds=[writer],
        start_new_session=True,
    )
    os.close(writer)
    with os.fdopen(ready) as answer:
        address = answer.readline().strip()
    if not address:
        server.wait(PATIENCE)
        text = (directory / "server.log").read_text().strip().splitlines()[-1:]
        sys.exit(f"the server did not start: {''.join(text)}")
    host, port = address.rsplit(":", 1)
    return server, (host, int(port))


def main():
    directory = pathlib.Path(sys.argv[1]).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    server, address = start(directory)
    print(f"server {server.pid} serves {directory / 'Data.fs'} on {address[0]}:{address[1]}")

    writer = ZODB.DB(zeo_rs.ClientStorage(address))
    reader = ZODB.DB(zeo_rs.ClientStorage(address))
    with writer.transaction() as connection:
        root = connection.root()
        root["visits"] = visits = root.get("visits", 0) + 1
        root.setdefault("greetings", PersistentMapping())[visits] = f"hello number {visits}"
    print(f"one client committed: visits = {visits}")
    reader.storage.ping()  # as server_sync does: everything committed until now has arrived
    with reader.transaction() as connection:
        greeting = connection.root()["greetings"][visits]
    print(f"another one read: {greeting!r}")
    if greeting != f"hello number {visits}":
        sys.exit("the second client read something else than the first one committed")
    writer.close()
    reader.close()

    print(
        f"""
The server goes on. To use it from Python ({sys.executable}):

    import ZODB, zeo_rs; db = ZODB.DB(zeo_rs.ClientStorage({address!r}))

To look at it and to stop it:

    {pathlib.Path(sys.executable).parent / 'zeo-rs'} status {address[0]}:{address[1]}
    kill {server.pid}"""
    )


if __name__ == "__main__":
    main()
