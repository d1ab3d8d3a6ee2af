"""TLS: ``TLS`` objects, ``ssl.SSLContext`` objects, and ZEO's ``<ssl>`` sections, made into what the Rust side takes.

The cryptography is rustls, not the ``ssl`` module's OpenSSL: a context is read, not used, so what cannot be read from one is
refused with the way to say it instead. The rules of trust are in ``docs/tls.md``.
"""

import os
import ssl
from importlib import import_module

from . import _zeo
from ._probe import has_certificate

__all__ = ["TLS", "client_ssl", "client_tls", "server_ssl", "server_tls"]


class TLS:
    """What one side of a connection shows and whom it trusts; for servers and clients.

    certificate, key
        PEM files. The key may be in the certificate's file.
    password
        Of the key, if it is encrypted: ``str``, ``bytes``, or a function returning one.
    authenticate
        A PEM file with, or an OpenSSL directory of, the certificates to accept, or those of the CAs that issued them.
        ``'DYNAMIC'``: for a server, nobody until :meth:`load_verify_locations` is called. A client without it (or with
        ``'DYNAMIC'``) trusts the system's CAs.
    check_hostname, server_hostname
        For clients: whether the server's certificate must be for the host; which host, instead of the address's.
    versions
        ``('TLSv1.2', 'TLSv1.3')`` or one of them, for clients.

    Files are read when the object is first used, and again by :meth:`reload`.
    """

    def __init__(
        self,
        certificate=None,
        key=None,
        password=None,
        authenticate=None,
        check_hostname=True,
        server_hostname=None,
        versions=(),
    ):
        if key is not None and certificate is None:
            raise ValueError("TLS: key needs certificate, the file of the certificate that it belongs to")
        self.certificate = _path(certificate)
        self.key = _path(key)
        self.password = password
        self.authenticate = _path(authenticate)
        self.check_hostname = bool(check_hostname)
        self.server_hostname = _ascii_host(server_hostname)
        self.versions = [versions] if isinstance(versions, str) else list(versions)
        self._certificates = None  # (whence, DER), instead of authenticate
        self._server = None
        self._clients = {}

    def __repr__(self):
        names = ("certificate", "key", "authenticate", "check_hostname", "server_hostname")
        return "TLS(%s)" % ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @classmethod
    def from_context(cls, context, certificate=None, key=None, password=None, server_hostname=None):
        """A client's ``ssl.SSLContext``, plus the certificate that cannot be read out of it.

        Trust, versions and host name check are taken from the context. ``ValueError`` if it says something that is not
        supported.
        """
        certificates = _readable(context)
        if certificate is None and has_certificate(context):
            raise _bad(
                context,
                "has a certificate of its own (load_cert_chain), which cannot be read from it",
                "zeo_rs.TLS.from_context(context, certificate='client.pem', key='client.key')",
            )
        self = cls(
            certificate,
            key,
            password,
            check_hostname=context.check_hostname,
            server_hostname=server_hostname,
            versions=_versions(context),
        )
        self._certificates = ("the ssl.SSLContext", certificates)
        return self

    def reload(self):
        """Read the files again, for connections made from now on. On an error everything stays as it was."""
        for made in self._made():
            made.reload()

    def load_verify_locations(self, cafile=None, cadata=None):
        """Trust more certificates from now on, as ``ssl.SSLContext`` has it: a PEM file, PEM text or DER bytes.

        This is how ``authenticate='DYNAMIC'`` is filled. Call it on the server's object after the server was made.
        """
        if cafile is None and cadata is None:
            raise TypeError("load_verify_locations: give cafile or cadata")
        made = self._made()
        if not made:
            raise RuntimeError("TLS: not in use yet; make the server or the client with it first")
        if cadata is not None and not isinstance(cadata, str):
            cadata = ssl.DER_cert_to_PEM_cert(bytes(cadata))
        for tls in made:
            if cafile is not None:
                tls.trust_file(os.fspath(cafile))
            if cadata is not None:
                tls.trust_pem(cadata.encode("ascii"))

    def _made(self):
        return [*([self._server] if self._server is not None else ()), *self._clients.values()]

    def for_server(self):
        """The Rust side's object for a server, made at the first call."""
        if self._server is None:
            if self.certificate is None:
                raise ValueError("TLS: a server needs certificate (and key)")
            if self.authenticate is None:
                raise ValueError(
                    "TLS: a server needs authenticate: a file or directory with the client certificates to accept, or"
                    " those of their CA; or 'DYNAMIC'"
                )
            self._server = _zeo.ServerTls(self.certificate, self.key, self.password, self.authenticate)
        return self._server

    def for_client(self, server_hostname=None):
        """The Rust side's object for a client, made at the first call with this host name."""
        host = _ascii_host(server_hostname) or self.server_hostname
        made = self._clients.get(host)
        if made is None:
            made = self._clients[host] = _zeo.ClientTls(
                self.certificate,
                self.key,
                self.password,
                self.authenticate,
                self.check_hostname,
                host,
                self.versions,
                self._certificates,
            )
        return made


# ---- what the APIs take


def client_tls(ssl, server_hostname=None):
    """``ClientStorage``'s ``ssl`` and ``ssl_server_hostname`` → ``_zeo.ClientTls``, or None without TLS."""
    if not ssl:
        return None
    if not isinstance(ssl, TLS):
        ssl = TLS.from_context(ssl)
    return ssl.for_client(server_hostname)


def server_tls(ssl):
    """A server's ``ssl`` → ``_zeo.ServerTls``, or None without TLS."""
    if not ssl:
        return None
    if not isinstance(ssl, TLS):
        raise _bad(
            ssl,
            "does not give its certificate and key out, so a server cannot use it",
            "zeo_rs.TLS(certificate='server.pem', key='server.key', authenticate='clients.pem')",
        )
    return ssl.for_server()


def _readable(context):
    """The certificates a client's context trusts; ``ValueError`` if the context says more than can be read from it."""
    instead = "zeo_rs.TLS(certificate='client.pem', key='client.key', authenticate='server.pem')"
    if not isinstance(context, ssl.SSLContext):
        raise _bad(context, "is neither zeo_rs.TLS nor ssl.SSLContext", instead)
    if context.protocol == ssl.PROTOCOL_TLS_SERVER:
        raise _bad(context, "is for servers", instead)
    if context.verify_mode == ssl.CERT_NONE:
        raise _bad(
            context,
            "verifies nothing (verify_mode CERT_NONE), which anybody in between can use",
            "zeo_rs.TLS(..., authenticate='server.pem', check_hostname=False)",
        )
    if not _has_default_ciphers(context):
        raise _bad(
            context,
            "chooses its ciphers (set_ciphers), which are OpenSSL's to choose from",
            instead + ", which has the few that rustls takes for safe; versions=['TLSv1.3'] leaves the newest of them",
        )
    stats = context.cert_store_stats()
    certificates = context.get_ca_certs(binary_form=True)
    crl_flags = ssl.VERIFY_CRL_CHECK_LEAF | ssl.VERIFY_CRL_CHECK_CHAIN
    if stats["crl"] or context.verify_flags & crl_flags:
        raise _bad(context, "has revocation lists, which cannot be read from it", instead + " with the lists in that file")
    if len(certificates) != stats["x509"]:
        raise _bad(context, "trusts certificates that are not CAs, which cannot be read from it", instead)
    if not certificates:
        raise _bad(
            context,
            "trusts no certificate that can be read from it (those of a capath are not loaded until used)",
            "zeo_rs.TLS(..., authenticate='that directory')",
        )
    return certificates


def _has_default_ciphers(context):
    """Whether the ciphers are those that a context has when it is made, in either way to make one."""
    names = [cipher["name"] for cipher in context.get_ciphers()]
    defaults = ssl.SSLContext(context.protocol), ssl.create_default_context()
    return any(names == [cipher["name"] for cipher in default.get_ciphers()] for default in defaults)


def _versions(context):
    lowest, highest = context.minimum_version, context.maximum_version
    wanted = [
        name
        for name, version in (("TLSv1.2", ssl.TLSVersion.TLSv1_2), ("TLSv1.3", ssl.TLSVersion.TLSv1_3))
        if (lowest == ssl.TLSVersion.MINIMUM_SUPPORTED or version >= lowest)
        and (highest == ssl.TLSVersion.MAXIMUM_SUPPORTED or version <= highest)
        and not context.options & getattr(ssl, "OP_NO_" + name.replace(".", "_"))
    ]
    if not wanted:
        raise _bad(context, "allows neither TLS 1.2 nor 1.3", "a context with a higher maximum_version")
    return wanted


def _bad(given, why, instead):
    kind = type(given)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return (TypeError if not isinstance(given, ssl.SSLContext) else ValueError)(
        f"TLS: this {name} {why}; pass {instead}"
    )


# ---- ZEO's sections


def server_ssl(section):
    """ZConfig datatype of a server's ``<ssl>`` section. The files are read now, so that errors come at the start."""
    tls = TLS(section.certificate, section.key, _password(section), section.authenticate)
    tls.for_server()
    return tls


def client_ssl(section):
    """ZConfig datatype of a client's ``<ssl>`` section: ``(TLS, server_hostname)``, for ``ClientStorage``."""
    tls = TLS(
        section.certificate,
        section.key,
        _password(section),
        section.authenticate,
        section.check_hostname,
        section.server_hostname,
    )
    tls.for_client()
    return tls, tls.server_hostname


def _password(section):
    """The function that ``password-function`` names."""
    name = section.password_function
    if not name:
        return None
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"password-function {name}: not a dotted name (package.module.function)")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"password-function {name}: {error}") from error
    if not callable(function):
        raise ValueError(f"password-function {name} is not a function")
    return function


def _path(value):
    return None if value is None else os.fsdecode(value)


def _ascii_host(host):
    """As the ``ssl`` module does: names in other scripts in their DNS form."""
    if not host:
        return None
    return host if host.isascii() else host.encode("idna").decode("ascii")
