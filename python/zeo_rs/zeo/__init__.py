"""Take over the names of ZEO: ``import zeo_rs.zeo``, or ``%import zeo_rs.zeo`` in a configuration file.

Afterwards ``ZEO.ClientStorage.ClientStorage``, ``ZEO.DB``, ``ZEO.client``, ``ZEO.connection``, ``ZEO.server``,
``ZEO.Exceptions`` and ``ZEO.interfaces`` are this project's, whether ZEO is installed or not. That is what makes an
unchanged ``<zeoclient>`` section of Zope and Plone use zeo-rs, because ZODB imports ``ZEO.ClientStorage`` for it.

Do it before anything else imports ZEO: a name that was already imported *from* a ZEO module stays what it was, and
that is reported as a warning. Other modules of an installed ZEO (``ZEO.tests``, ``ZEO.scripts``) stay importable.

``%import ZEO`` with its ``<clientstorage>`` and ``<ssl>`` works too: with ZEO's own ``component.xml`` if ZEO is installed,
whose datatypes in ``ZEO.zconfig`` are taken over, else with that of this package (``stand_in``).
"""

import importlib.machinery
import importlib.util
import logging
import os
import sys
import types

import zeo_rs
import zeo_rs.exceptions
import zeo_rs.interfaces
from zeo_rs import blobcache, clientstorage, tls
from zeo_rs.clientstorage import ClientStorage
from zeo_rs.zeo import names

logger = logging.getLogger('zeo_rs.zeo')

_TOP = {
    'ClientStorage': ClientStorage,  # replaced by the submodule below, as an import of it would
    'DB': zeo_rs.DB,
    'client': zeo_rs.client,
    'connection': zeo_rs.connection,
    'server': zeo_rs.server,
}


def take_over():
    """Put this project's objects behind ZEO's names. Harmless when done again."""
    top = _module('ZEO', _installed())
    submodules = {
        'ClientStorage': {
            'ClientStorage': ClientStorage,
            'ClientDisconnected': zeo_rs.exceptions.ClientDisconnected,
            'TransactionIterator': clientstorage.TransactionIterator,
            'RecordIterator': clientstorage.RecordIterator,
            'ClientStorageTransactionInformation': clientstorage.TransactionRecord,
            'BlobCacheLayout': blobcache.CacheLayout,
            'check_blob_size_script': names.check_blob_size_script,
            'tid2time': names.tid2time,
            'get_timestamp': names.get_timestamp,
            'MB': clientstorage.MB,
            'logger': clientstorage.logger,
        },
        'Exceptions': _public(zeo_rs.exceptions),
        'interfaces': _public(zeo_rs.interfaces),
        'zconfig': {
            'ClientStorageConfig': names.ClientStorageConfig,
            'client_ssl': tls.client_ssl,
            'server_ssl': tls.server_ssl,
        },
    }
    for name, contents in submodules.items():
        module = _module(f'ZEO.{name}')
        vars(module).update(contents)
        setattr(top, name, module)
    vars(top).update({name: value for name, value in _TOP.items() if name not in submodules})


def _module(name, spec=None):
    """The module of that name: the one already imported, else an empty one that stands for it from now on."""
    module = sys.modules.get(name)
    if module is not None:
        if not getattr(module, '__zeo_rs__', False):
            logger.warning('%s was imported before zeo_rs.zeo; who holds names from it keeps using ZEO', name)
            module.__zeo_rs__ = True
        return module
    if spec is not None:
        # with a path and a loader, which ZConfig and pkgutil ask for its files; its code is not run
        module = importlib.util.module_from_spec(spec)
    else:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__doc__ = f'{name}, provided by zeo-rs'
    module.__zeo_rs__ = True
    sys.modules[name] = module
    return module


def _installed():
    """Where an installed ZEO lies, so that its files and its other modules are found there; else this package's stand-in."""
    if 'ZEO' in sys.modules:
        return None  # it stays what it is
    try:
        spec = importlib.util.find_spec('ZEO')
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin is not None:
        return spec
    directory = os.path.join(os.path.dirname(__file__), 'stand_in')
    return importlib.util.spec_from_file_location(
        'ZEO', os.path.join(directory, '__init__.py'), submodule_search_locations=[directory]
    )


def _public(module):
    """What the module itself defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith('_') and getattr(value, '__module__', None) == module.__name__
    }


take_over()
