"""Progress bars, on a terminal only."""

import sys

from tqdm import tqdm


def _bar(text, total, quiet, unit="B"):
    return tqdm(
        desc=text,
        total=total,
        unit=unit,
        unit_scale=True,
        # nothing in logs and pipes
        disable=quiet or not sys.stderr.isatty(),
        leave=False,
        dynamic_ncols=True,
    )


class Progress:
    """Of a pack or a check, which go through phases: called with `phase`, `bytes_done`, `bytes_total`, `objects_done`,
    `objects_total`. A phase that knows how many objects there are, and not how many bytes, is measured by those."""

    def __init__(self, quiet=False):
        self._quiet = quiet
        self._bar = None
        self._phase = None
        self._by_objects = False

    def __call__(self, at):
        if at["phase"] != self._phase:
            self.end()
            self._phase = at["phase"]
            self._by_objects = bool(at.get("objects_total") and not at["bytes_total"])
            if self._by_objects:
                self._bar = _bar(self._phase, at["objects_total"], self._quiet, " objects")
            else:
                self._bar = _bar(self._phase, at["bytes_total"] or None, self._quiet)
        if self._by_objects:
            self._bar.update(min(at["objects_done"], self._bar.total) - self._bar.n)
            return
        self._bar.set_postfix_str(f"{at['objects_done']:,} objects", refresh=False)
        self._bar.update(at["bytes_done"] - self._bar.n)

    def end(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Bar:
    """Of a copy: `copied` takes a `zeo_rs.copying.Progress`."""

    def __init__(self, text, total, quiet=False):
        self._bar = _bar(text, total, quiet)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._bar.close()

    def copied(self, done):
        bar = self._bar
        if bar.total is not None:
            # the total is the size of the records; blobs come on top
            bar.total = max(bar.total, done.bytes)
        bar.set_postfix_str(f"{done.transactions:,} transactions, {done.blobs:,} blobs", refresh=False)
        bar.update(done.bytes - bar.n)
