"""Traces of caches, ours and ZEO's, as the commands read them."""

import gzip


def read(path):
    """The bytes of a trace; one whose name ends in ``.gz`` is unpacked."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        return file.read()


def size(text):
    """Bytes of ``20`` (megabytes, as ZEO's cache_simul has it), ``512KB``, ``20MB``, ``1GB``."""
    text = text.strip().upper()
    for unit, factor in (("KB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30), ("", 1 << 20)):
        if text.endswith(unit):
            number = float(text[: len(text) - len(unit)])
            break
    if not 0 < number * factor < 1 << 44:
        raise ValueError(f"{text} is no size of a cache")
    return int(number * factor)
