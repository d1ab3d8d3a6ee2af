"""ZODB's pack on the file that `cargo bench --bench pack` made; see there."""

import os
import resource
import shutil
import sys
import time

from ZODB.FileStorage import FileStorage
from ZODB.serialize import referencesf


def main(directory):
    source = os.path.join(directory, "source.fs")
    path = os.path.join(directory, "zodb.fs")
    for gc in True, False:
        for suffix in "", ".index", ".old":
            if os.path.exists(path + suffix):
                os.remove(path + suffix)
        shutil.copy(source, path)
        start = time.perf_counter()
        storage = FileStorage(path)
        print(f"{time.perf_counter() - start:8.3f} s  opened without index")
        start = time.perf_counter()
        storage.pack(time.time(), referencesf, gc=gc)
        print(f"{time.perf_counter() - start:8.3f} s  pack {'gc' if gc else 'nogc'}")
        storage.close()
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "kB")


if __name__ == "__main__":
    main(sys.argv[1])
