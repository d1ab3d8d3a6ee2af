"""Progress bars, on a terminal only."""

import sys
import threading

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


#: Seconds between two looks at blobs on their way.
LOOK_EVERY = 0.2


class Bar:
    """Of a copy: `copied` takes a `zeo_rs.copying.Progress`. `watch`: storages whose blobs on their way are shown too."""

    def __init__(self, text, total, quiet=False, watch=()):
        self._bar = _bar(text, total, quiet)
        self._done = None
        self._lock = threading.Lock()
        self._watched = [storage for storage in watch if hasattr(storage, "blob_stats")]
        self._ended = threading.Event()
        self._watcher = None
        if self._watched and not self._bar.disable:
            self._watcher = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self):
        if self._watcher is not None:
            self._watcher.start()
        return self

    def __exit__(self, *exc_info):
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
        self._bar.close()

    def copied(self, done):
        self._done = done
        self._show()

    def _watch(self):
        while not self._ended.wait(LOOK_EVERY):
            self._show([transfer for storage in self._watched for transfer in storage.blob_stats()["transfers"]])

    def _show(self, transfers=()):
        """What is being sent counts already, what is being received does not count yet."""
        done, bar = self._done, self._bar
        text, sent = [], 0
        if done is not None:
            text.append(f"{done.transactions:,} transactions, {done.blobs:,} blobs")
            sent = done.bytes + done.blob_bytes
        for transfer in transfers:
            if transfer["direction"] == "up":
                sent += transfer["bytes_done"]
            else:
                text.append(f"{tqdm.format_sizeof(transfer['bytes_done'])}B of a blob received")
        with self._lock:
            if bar.total is not None:
                # the total is the size of the file, not exactly that of what is in it
                bar.total = max(bar.total, sent)
            bar.set_postfix_str(", ".join(text), refresh=bool(transfers))
            bar.update(max(sent - bar.n, 0))
