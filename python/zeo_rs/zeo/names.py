"""Names that ``ZEO.ClientStorage`` and ``ZEO.zconfig`` have and that this project needs for nothing else."""

import sys

import ZODB.config
from persistent.TimeStamp import TimeStamp
from ZODB.utils import newTid

from zeo_rs import blobcache
from zeo_rs.clientstorage import ClientStorage


def tid2time(tid):
    """A tid as text: when it was given."""
    return str(TimeStamp(tid))


def get_timestamp(prev_ts=None):
    """A ``TimeStamp`` of now, later than ``prev_ts`` in any case."""
    return TimeStamp(newTid(prev_ts.raw() if prev_ts is not None else None))


def check_blob_size_script(args=None):
    """``DIRECTORY BYTES``: remove blobs used longest ago from a client's directory until at most so many bytes are left."""
    directory, target = sys.argv[1:] if args is None else args
    blobcache.check_size(directory, int(target))


class ClientStorageConfig(ZODB.config.BaseConfig):
    """``<clientstorage>`` of ZEO's own ``component.xml``, whose ``<ssl>`` has become ``(TLS, server_hostname)``."""

    def open(self):
        config = self.config
        options = {
            name: getattr(config, name)
            for name in (
                "storage",
                "cache_size",
                "name",
                "blob_dir",
                "shared_blob_dir",
                "blob_cache_size",
                "blob_cache_size_check",
                "read_only",
                "read_only_fallback",
                "server_sync",
                "wait_timeout",
                "client_label",
            )
            # what is not given has the default of the class
            if getattr(config, name) is not None
        }
        if config.ssl:
            options["ssl"], options["ssl_server_hostname"] = config.ssl
        return ClientStorage([server.address for server in config.server], cache=config.cache_path, **options)
