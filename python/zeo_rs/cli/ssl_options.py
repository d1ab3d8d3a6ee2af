"""The options of commands that talk to a server with TLS, as the keys of an `<ssl>` section."""

import os
import ssl

from zeo_rs.tls import TLS


def arguments(parser):
    add = parser.add_argument_group("a server with TLS").add_argument
    add("--ssl-certificate", metavar="PEM", help="the certificate to show (a server wants one)")
    add("--ssl-key", metavar="PEM", help="its key, if it is not in the same file")
    add("--ssl-authenticate", metavar="PATH", help="file or directory of the server's certificate or its CA (default: the system's CAs)")
    add("--ssl-server-hostname", metavar="NAME", help="the host that the server's certificate is for, if not that of the address")


def given(args):
    """Whether any of them is, which means TLS. Raises `ValueError`."""
    if args.ssl_key and not args.ssl_certificate:
        raise ValueError("--ssl-key needs --ssl-certificate, the file of the certificate that it belongs to")
    return bool(args.ssl_certificate or args.ssl_authenticate or args.ssl_server_hostname)


def for_storage(args):
    """Arguments of `ClientStorage`."""
    if not given(args):
        return {}
    tls = TLS(
        args.ssl_certificate, args.ssl_key, authenticate=args.ssl_authenticate, server_hostname=args.ssl_server_hostname
    )
    return {"ssl": tls}


def wrap(sock, host, args):
    """The socket, connected to `host`, with TLS on it. Raises `OSError` (`ssl.SSLError`), `ValueError`.

    Not by rustls, which sits below a `ClientStorage`: this is a question and an answer.
    """
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
        if args.ssl_authenticate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _trust(context, args.ssl_authenticate)
        if args.ssl_certificate:
            context.load_cert_chain(args.ssl_certificate, args.ssl_key)
    except OSError as error:
        raise ValueError(f"TLS: {error}: {args.ssl_authenticate or ''} {args.ssl_certificate or ''}".rstrip()) from error
    # a certificate that is trusted itself needs no CA, as in docs/tls.md
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    name = args.ssl_server_hostname or host
    if name is None:
        raise ValueError("TLS over a Unix socket needs --ssl-server-hostname, the host that the certificate is for")
    return context.wrap_socket(sock, server_hostname=name)


def _trust(context, path):
    if os.path.isdir(path):
        context.load_verify_locations(capath=path)
    else:
        context.load_verify_locations(cafile=path)
