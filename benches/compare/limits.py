"""The machine's own limits, measured in the same run by a small Rust program (limits.rs): the last column of the tables."""
import functools
import json
import os
import statistics
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
    """Each figure is the median of a few runs and measured once in a run of the benchmark, when first asked for."""

    def __init__(self, directory, rounds=3):
        self.binary, self.directory, self.rounds = build(directory), directory, rounds

    def _run(self, *args, timeout=120):
        done = subprocess.run([self.binary, *map(str, args)], capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise Failed(f"limits {args[0]}: {done.stderr.strip()}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def _median(self, key, *args):
        return statistics.median(self._run(*args)[key] for _ in range(self.rounds))

    @functools.cache
    def roundtrip(self, request=LOAD[0], reply=LOAD[1]):
        """Seconds of one loopback round trip."""
        return self._median("seconds", "roundtrip", request, reply, 20000, 1)

    @functools.cache
    def roundtrips_per_second(self, connections, request=LOAD[0], reply=LOAD[1]):
        return self._median("per_second", "roundtrip", request, reply, 60000 // connections, connections)

    @functools.cache
    def stream(self, size):
        """Seconds to send `size` bytes over loopback and have them acknowledged by the reader."""
        return self._median("seconds", "stream", size)

    @functools.cache
    def sync(self, size=600):
        """Seconds of one append of `size` bytes with fdatasync, on the disk of the databases."""
        path = os.path.join(self.directory, "sync.tmp")
        try:
            return self._median("seconds", "sync", path, size, 100 if size < 1e5 else 5)
        finally:
            os.unlink(path)

    @functools.cache
    def pread(self, path, size=300):
        return self._median("seconds", "pread", path, size, 200_000)

    @functools.cache
    def memcpy(self, size=250):
        return self._median("seconds", "memcpy", size, 1_000_000 if size < 1e4 else 20)
