"""A line that tells how far a pack or a check is, on a terminal."""

import sys


class Progress:
    def __init__(self, quiet=False):
        self._show = not quiet and sys.stderr.isatty()

    def __call__(self, at):
        if not self._show:
            return
        done, total = at["bytes_done"], at["bytes_total"]
        share = f"{100 * done // total:3d}%" if total else "    "
        text = f"\r{at['phase']:<10} {share} {done / 1e6:12,.1f} MB  {at['objects_done']:>12,} objects"
        sys.stderr.write(text)
        sys.stderr.flush()

    def end(self):
        if self._show:
            sys.stderr.write("\r\033[K")
