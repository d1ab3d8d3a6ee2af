"""The machine's own limits, measured in the same run by a small Rust program (limits.rs): the last column of the tables."""
import functools
import json
import os
import subprocess

from .harness import HERE, Failed

# frames of one cold load of a 250 byte record: (request, reply) with their length prefix, msgpack
LOAD = (59, 300)
CALL = (30, 20)                                               # a call with next to no arguments


def build(directory):
    source, binary = os.path.join(HERE, "limits.rs"), os.path.join(directory, "limits")
    if not os.path.exists(binary) or os.path.getmtime(binary) < os.path.getmtime(source):
        subprocess.run(["rustc", "-O", "--edition", "2024", "-o", binary, source], check=True)
    return binary


class Limits:
    """Figures in seconds. The harness asks anew in each round, because a virtual machine's wake-ups vary with its load."""

    def __init__(self, directory):
        self.binary, self.directory = build(directory), directory

    def _run(self, *args, timeout=120):
        try:
            done = subprocess.run([self.binary, *map(str, args)], capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"limits {args[0]} took more than {timeout} s") from None
        if done.returncode:
            raise Failed(f"limits {args[0]}: {done.stderr.strip()}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def roundtrip(self, request=LOAD[0], reply=LOAD[1]):
        """Seconds of one loopback round trip."""
        return self._run("roundtrip", request, reply, 4000, 1)["seconds"]

    def roundtrips_per_second(self, connections, request=LOAD[0], reply=LOAD[1]):
        return self._run("roundtrip", request, reply, 40000 // connections, connections)["per_second"]

    def peer_cpu(self, connections, request=LOAD[0], reply=LOAD[1]):
        """Seconds of CPU that answering one round trip costs a process that does nothing else."""
        return self._run("roundtrip", request, reply, 40000 // connections, connections)["peer_cpu"]

    def stream(self, size):
        """Seconds to send `size` bytes over loopback and have them acknowledged by the reader."""
        return self._run("stream", size)["seconds"]

    def sync(self, size=600):
        """Seconds of one append of `size` bytes with fdatasync, on the disk of the databases."""
        path = os.path.join(self.directory, "sync.tmp")
        try:
            return self._run("sync", path, size, 100 if size < 1e5 else 5)["seconds"]
        finally:
            os.unlink(path)

    @functools.cache
    def pread(self, path, size=300):
        return self._run("pread", path, size, min(200_000, (2 << 30) // size))["seconds"]

    @functools.cache
    def memcpy(self, size=250):
        return self._run("memcpy", size, 1_000_000 if size < 1e4 else 20)["seconds"]
