"""Whether an ``ssl.SSLContext`` has a client certificate: the ``ssl`` module does not say, so it is asked for one."""

import os
import ssl
import tempfile

#: A key that protects nothing and the certificate of nobody: for a server in this process that talks to itself.
NOBODY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg/9U3d6V0oetnQcaz
YyKpHEHMj8JURLrheyCECoKN3lGhRANCAARClSxD5oJIDkJtzIP7OWjBNVoYUvxF
7hYHE9ei4j9N0VNrzmyKqLf2q1Jf/N5ONr/e/FT43pOLbNBvOPJJuXzT
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBejCCAR+gAwIBAgIUbMSpbST1WfFG9AAaUYepqRCpZ7EwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGbm9ib2R5MCAXDTI2MTEyNzE5MzY0N1oYDzIxMjYxMTAzMTkz
NjQ3WjARMQ8wDQYDVQQDDAZub2JvZHkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AARClSxD5oJIDkJtzIP7OWjBNVoYUvxF7hYHE9ei4j9N0VNrzmyKqLf2q1Jf/N5O
Nr/e/FT43pOLbNBvOPJJuXzTo1MwUTAdBgNVHQ4EFgQUvDhvOp9ovjlCci0+aiF1
E6m2ZUQwHwYDVR0jBBgwFoAUvDhvOp9ovjlCci0+aiF1E6m2ZUQwDwYDVR0TAQH/
BAUwAwEB/zAKBggqhkjOPQQDAgNJADBGAiEA03YZtLUQyHPR6bJTxYr4Kv9N7byT
j/Ccx3C+2miahG4CIQD8l3Ya1B7GQ7Xai2kXot4M53iP4IuLJ6pM6uSGj+Efgw==
-----END CERTIFICATE-----
"""


def has_certificate(context):
    """Shake hands with a server in memory that asks for a certificate. The context is not changed, nor ever connected.

    The connection is made from another context, that verifies nothing, and only then given the certificates of this one
    (``SSL_set_SSL_CTX`` takes nothing else of it).
    """
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.verify_mode = ssl.CERT_OPTIONAL
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "nobody.pem")
        with open(path, "w") as file:
            file.write(NOBODY)
        server_context.load_cert_chain(path)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_mode = ssl.CERT_NONE
    # 1.3 would ask only after the client is content
    client_context.minimum_version = client_context.maximum_version = ssl.TLSVersion.TLSv1_2
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    client.context = context
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for side in (client, server, client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    except ssl.SSLCertVerificationError:
        # the server's, which trusts nobody
        return True
    except ssl.SSLError:
        return False  # they cannot talk; the certificate is then missed where it is wanted
    return False
