"""What an application sees: ZODB connections with unpickling, on top of a client storage."""
import gc
import random
from time import perf_counter_ns

import ZODB

from compare.worker import database_storage


def read(kind, addr, pages, count, seed=0):
    """Opens a database and reads `count` cold objects by following references from their pages."""
    db = ZODB.DB(database_storage(kind, addr))
    try:
        connection = db.open()
        root = connection.root()
        rng = random.Random(seed)
        objects = []
        for number in rng.sample(range(len(root)), min(pages, len(root))):
            page = root[str(number)]
            objects += list(page.values())
        rng.shuffle(objects)
        objects = objects[:count]
        gc.collect()
        yield
        begin = perf_counter_ns()
        total = 0
        for obj in objects:
            total += len(obj["body"])
        end = perf_counter_ns()
        # the same unpickling with no storage below it: the part that no client can shorten
        records = [connection._storage.load(obj._p_oid)[0] for obj in objects]
        for obj in objects:
            obj._p_deactivate()
        reader, start = connection._reader, perf_counter_ns()
        for obj, record in zip(objects, records):
            reader.setGhostState(obj, record)
        unpickle = perf_counter_ns() - start
        return {"begin": begin, "end": end, "count": len(objects), "unpickle_ns": unpickle, "total": total}
    finally:
        db.close()
