"""Take over the names of ZEO: ``import zeo_rs.zeo``, or ``%import zeo_rs.zeo`` in a configuration file.

Afterwards ``ZEO.ClientStorage.ClientStorage``, ``ZEO.DB``, ``ZEO.client``, ``ZEO.connection``, ``ZEO.server``,
``ZEO.Exceptions`` and ``ZEO.interfaces`` are this project's, whether ZEO is installed or not. That is what makes an
unchanged ``<zeoclient>`` section of Zope and Plone use zeo-rs, because ZODB imports ``ZEO.ClientStorage`` for it.

Do it before anything else imports ZEO: a name that was already imported *from* a ZEO module stays what it was, and
that is reported as a warning. Other modules of an installed ZEO (``ZEO.tests``, ``ZEO.scripts``) stay importable.
"""

import importlib.machinery
import importlib.util
import logging
import sys
import types

import zeo_rs
import zeo_rs.exceptions
import zeo_rs.interfaces
from zeo_rs.clientstorage import ClientStorage


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
    top = _module('ZEO', path=_installed_path())
    submodules = {
        'ClientStorage': {'ClientStorage': ClientStorage, **_public(zeo_rs.exceptions)},
        'Exceptions': _public(zeo_rs.exceptions),
        'interfaces': _public(zeo_rs.interfaces),
    }
    for name, contents in submodules.items():
        module = _module(f'ZEO.{name}')
        vars(module).update(contents)
        setattr(top, name, module)
    vars(top).update({name: value for name, value in _TOP.items() if name not in submodules})


def _module(name, path=None):
    """The module of that name: the one already imported, else an empty one that stands for it from now on."""
    module = sys.modules.get(name)
    if module is not None:
        if not getattr(module, '__zeo_rs__', False):
            logger.warning('%s was imported before zeo_rs.zeo; who holds names from it keeps using ZEO', name)
            module.__zeo_rs__ = True
        return module
    module = types.ModuleType(name, f'{name}, provided by zeo-rs')
    module.__zeo_rs__ = True
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=path is not None)
    if path is not None:
        module.__path__ = path
    sys.modules[name] = module
    return module


def _installed_path():
    """Where an installed ZEO lies, so that its other modules can be imported; else nowhere."""
    if 'ZEO' in sys.modules:
        return list(getattr(sys.modules['ZEO'], '__path__', []))
    try:
        spec = importlib.util.find_spec('ZEO')
    except (ImportError, ValueError):
        spec = None
    return list(spec.submodule_search_locations or []) if spec is not None else []


def _public(module):
    return {name: value for name, value in vars(module).items() if not name.startswith('_')}


take_over()
