"""``zeo_rs.TLS`` and ``ssl.SSLContext`` objects: what is taken, what is refused, and what the errors say."""

import ssl
from pathlib import Path
from types import SimpleNamespace

import pytest

import zeo_rs
from zeo_rs import tls

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tls"


def pem(name):
    return FIXTURES / f"{name}.pem"


def key(name):
    return FIXTURES / f"{name}.key"


def context(cafile="server", **attributes):
    made = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=cafile and pem(cafile))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def section(**settings):
    names = ("certificate", "key", "password_function", "authenticate", "server_hostname")
    return SimpleNamespace(**(dict.fromkeys(names) | {"check_hostname": True} | settings))


def ask():
    return bytearray(b"secret")


def refuse():
    raise RuntimeError("the vault is sealed")


not_a_function = 5


def test_nothing_is_no_tls():
    assert tls.client_tls(None) is None
    assert tls.server_tls(None) is None


def test_a_tls_object_serves_both_sides():
    both = zeo_rs.TLS(pem("server"), key("server"), authenticate=pem("client"))
    assert tls.server_tls(both) is tls.server_tls(both)
    assert tls.client_tls(both) is tls.client_tls(both, None)
    assert tls.client_tls(both, "zeo.example.com") is not tls.client_tls(both)
    both.reload()


@pytest.mark.parametrize("password", ["secret", b"secret", bytearray(b"secret"), lambda: "secret", ask])
def test_passwords(password):
    zeo_rs.TLS(pem("server"), pem("key-pkcs8"), password, pem("client")).for_server()


def test_wrong_passwords():
    def fails(password, error=ssl.SSLError):
        with pytest.raises(error) as caught:
            zeo_rs.TLS(pem("server"), pem("key-pkcs8"), password, pem("client")).for_server()
        return str(caught.value)

    assert "is encrypted" in fails(None) and "password" in fails(None)
    assert "does not decrypt" in fails("wrong") and str(pem("key-pkcs8")) in fails("wrong")
    assert "the vault is sealed" in fails(refuse)
    assert "must be str or bytes" in fails(lambda: 5)
    assert "must be str or bytes" in fails(5.0, TypeError)


def test_what_a_server_needs():
    with pytest.raises(ValueError, match="needs certificate"):
        zeo_rs.TLS(authenticate=pem("client")).for_server()
    with pytest.raises(ValueError, match="needs authenticate"):
        zeo_rs.TLS(pem("server"), key("server")).for_server()
    with pytest.raises(ValueError, match="key needs certificate"):
        zeo_rs.TLS(key=key("server"))
    for word in ("-", "SIGNED"):
        with pytest.raises(ValueError, match=f"authenticate {word} does not work"):
            zeo_rs.TLS(pem("server"), key("server"), authenticate=word).for_server()
    with pytest.raises(FileNotFoundError, match=r"missing\.pem"):
        zeo_rs.TLS(pem("missing"), authenticate=pem("client")).for_server()


def test_host_names():
    with pytest.raises(ValueError, match="not a host name"):
        zeo_rs.TLS(authenticate=pem("server"), server_hostname="a b").for_client()
    assert zeo_rs.TLS(server_hostname="bücher.example").server_hostname == "xn--bcher-kva.example"


def test_dynamic_is_filled_after_the_server_was_made():
    dynamic = zeo_rs.TLS(pem("server"), key("server"), authenticate="DYNAMIC")
    with pytest.raises(RuntimeError, match="not in use yet"):
        dynamic.load_verify_locations(cafile=pem("client"))
    dynamic.for_server()
    dynamic.load_verify_locations(cafile=pem("client"))
    dynamic.load_verify_locations(cadata=pem("stranger").read_text())
    dynamic.load_verify_locations(cadata=(FIXTURES / "server.der").read_bytes())
    with pytest.raises(TypeError):
        dynamic.load_verify_locations()
    with pytest.raises(ssl.SSLError, match="no certificate"):
        dynamic.load_verify_locations(cafile=key("client"))


# ---- ssl.SSLContext


def test_contexts_are_read():
    taken = zeo_rs.TLS.from_context(context())
    assert taken.check_hostname and taken.versions == ["TLSv1.2", "TLSv1.3"]
    assert taken._certificates[1] == [ssl.PEM_cert_to_DER_cert(pem("server").read_text())]
    assert tls.client_tls(context(), "zeo.example.com")
    assert not zeo_rs.TLS.from_context(context(check_hostname=False)).check_hostname
    only = context(minimum_version=ssl.TLSVersion.TLSv1_3)
    assert zeo_rs.TLS.from_context(only).versions == ["TLSv1.3"]
    only = context(maximum_version=ssl.TLSVersion.TLSv1_2)
    assert zeo_rs.TLS.from_context(only).versions == ["TLSv1.2"]
    without = context()
    without.options |= ssl.OP_NO_TLSv1_3
    assert zeo_rs.TLS.from_context(without).versions == ["TLSv1.2"]


def unverified():
    made = context(check_hostname=False)
    made.verify_mode = ssl.CERT_NONE
    return made


def with_crl():
    made = context("ca-and-crl")
    made.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return made


def only_1_1():
    made = context()
    with pytest.warns(DeprecationWarning):
        made.minimum_version = ssl.TLSVersion.TLSv1
        made.maximum_version = ssl.TLSVersion.TLSv1_1
    return made


def with_certificate(name):
    made = context()
    made.load_cert_chain(pem(name), key(name))
    return made


def test_a_certificate_beside_the_context_is_taken():
    made = with_certificate("leaf")
    before = made.verify_mode, made.check_hostname, made.options
    taken = zeo_rs.TLS.from_context(made, certificate=pem("leaf"), key=key("leaf"))
    assert taken.for_client() is not None
    with pytest.raises(ValueError, match="load_cert_chain"):
        zeo_rs.TLS.from_context(made)
    assert before == (made.verify_mode, made.check_hostname, made.options), "it is looked at, not changed"


def chosen_ciphers():
    made = context()
    made.set_ciphers("ECDHE+AESGCM")
    return made


@pytest.mark.parametrize(
    ("made", "why", "instead"),
    [
        (unverified, "CERT_NONE", "check_hostname=False"),
        (with_crl, "revocation lists", "authenticate="),
        (lambda: context("not-ca"), "not CAs", "authenticate="),
        (lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "trusts no certificate", "authenticate="),
        (lambda: ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), "is for servers", "zeo_rs.TLS("),
        (lambda: with_certificate("leaf"), "load_cert_chain", "from_context(context, certificate="),
        (lambda: with_certificate("ed25519"), "load_cert_chain", "from_context(context, certificate="),
        (chosen_ciphers, "set_ciphers", "versions="),
        (only_1_1, "neither TLS 1.2 nor 1.3", "maximum_version"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_contexts_that_cannot_be_honoured_are_refused(made, why, instead):
    with pytest.raises(ValueError) as caught:
        tls.client_tls(made())
    assert why in str(caught.value) and instead in str(caught.value)


def test_server_contexts_are_refused():
    with pytest.raises(ValueError, match="does not give its certificate and key out.*zeo_rs.TLS"):
        tls.server_tls(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))


def test_other_objects_are_refused():
    for take in (tls.client_tls, tls.server_tls):
        with pytest.raises(TypeError, match=r"zeo_rs\.TLS"):
            take("server.pem")


# ---- ZEO's sections


def test_sections():
    server = tls.server_ssl(
        section(
            certificate=str(pem("server")),
            key=str(pem("key-legacy-des3")),
            password_function=f"{__name__}.ask",
            authenticate=str(pem("client")),
        )
    )
    assert isinstance(server, zeo_rs.TLS)
    client, hostname = tls.client_ssl(
        section(authenticate=str(pem("server")), server_hostname="zeo.example.com", check_hostname=False)
    )
    assert hostname == "zeo.example.com" and not client.check_hostname


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ask", "not a dotted name"),
        ("no_such_module.ask", "no_such_module"),
        (f"{__name__}.missing", "missing"),
        (f"{__name__}.not_a_function", "is not a function"),
    ],
)
def test_password_functions_that_are_none(name, why):
    with pytest.raises(ValueError, match=why):
        tls.server_ssl(section(certificate=str(pem("server")), password_function=name, authenticate=str(pem("client"))))
