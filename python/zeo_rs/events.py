"""What a server in this process tells the subscribers of ``zope.event`` (``ZODB.event``): that it serves, that it has closed."""


class ServerEvent:
    """``server`` is the running server: ``address``, ``addresses``, ``http_address``, ``status()``, ``stop()``."""

    def __init__(self, server, **kw):
        self.__dict__.update(kw)
        self.server = server


class Serving(ServerEvent):
    """Clients can connect, to ``address`` (the first, if there are several)."""


class Closed(ServerEvent):
    """The server has stopped and its storages are closed."""
