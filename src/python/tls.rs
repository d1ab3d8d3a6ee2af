//! `_zeo.ServerTls`, `_zeo.ClientTls`: certificates, keys and trust, read and checked when they are made. `zeo_rs/tls.py` gives them
//! their arguments, from `zeo_rs.TLS`, `<ssl>` sections and `ssl.SSLContext` objects.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::net::tls::{
    Authenticate, ClientTls, ClientTlsOptions, Password, PemSource, ServerTls, ServerTlsOptions, TlsError,
    TlsVersion,
};

mod raised {
    pyo3::import_exception!(ssl, SSLError);
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyServerTls>()?;
    m.add_class::<PyClientTls>()
}

/// `ServerTls(certificate, key, password, authenticate)`.
#[pyclass(name = "ServerTls", module = "zeo_rs._zeo", frozen)]
pub(crate) struct PyServerTls(pub(crate) Arc<ServerTls>);

/// `ClientTls(certificate, key, password, authenticate, check_hostname, server_hostname, versions, certificates)`:
/// `certificates`, in DER, stand for what `authenticate` would name.
#[pyclass(name = "ClientTls", module = "zeo_rs._zeo", frozen)]
pub(crate) struct PyClientTls(pub(crate) Arc<ClientTls>);

#[pymethods]
impl PyServerTls {
    #[new]
    fn new(
        py: Python<'_>,
        certificate: PathBuf,
        key: Option<PathBuf>,
        password: Option<Bound<'_, PyAny>>,
        authenticate: &str,
    ) -> PyResult<Self> {
        let password = password.map(password_of).transpose()?;
        let tls = || {
            let authenticate = Authenticate::for_server(authenticate)?;
            ServerTls::new(ServerTlsOptions { certificate, key, password, authenticate })
        };
        py.detach(tls).map(|tls| Self(Arc::new(tls))).map_err(raise)
    }

    /// Reads the files again; on an error everything stays as it was.
    fn reload(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.reload()).map_err(raise)
    }

    fn trust_file(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.trust(PemSource::File(&path))).map_err(raise)
    }

    fn trust_pem(&self, pem: &[u8]) -> PyResult<()> {
        self.0.trust(PemSource::Text(pem)).map_err(raise)
    }
}

#[pymethods]
impl PyClientTls {
    #[new]
    #[pyo3(signature = (certificate, key, password, authenticate, check_hostname, server_hostname, versions, certificates=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
        password: Option<Bound<'_, PyAny>>,
        authenticate: Option<&str>,
        check_hostname: bool,
        server_hostname: Option<String>,
        versions: Vec<String>,
        certificates: Option<(String, Vec<Vec<u8>>)>,
    ) -> PyResult<Self> {
        let password = password.map(password_of).transpose()?;
        let versions = versions.iter().map(|name| version_of(name)).collect::<PyResult<_>>()?;
        let tls = || {
            let authenticate = match certificates {
                Some((from, certificates)) => Authenticate::Certificates { from, certificates },
                None => Authenticate::for_client(authenticate)?,
            };
            ClientTls::new(ClientTlsOptions {
                certificate,
                key,
                password,
                authenticate,
                check_hostname,
                server_hostname,
                versions,
            })
        };
        py.detach(tls).map(|tls| Self(Arc::new(tls))).map_err(raise)
    }

    /// Reads the files again; on an error everything stays as it was.
    fn reload(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.reload()).map_err(raise)
    }

    fn trust_file(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.trust(PemSource::File(&path))).map_err(raise)
    }

    fn trust_pem(&self, pem: &[u8]) -> PyResult<()> {
        self.0.trust(PemSource::Text(pem)).map_err(raise)
    }
}

/// Text, bytes, or a function that is called when an encrypted key is met (and at each reload).
fn password_of(value: Bound<'_, PyAny>) -> PyResult<Password> {
    if value.is_callable() {
        let function = value.unbind();
        return Ok(Password::new(move || {
            Python::attach(|py| {
                let given = function.call0(py).map_err(|error| error.to_string())?;
                bytes_of(given.bind(py)).map_err(|error| error.to_string())
            })
        }));
    }
    let password = bytes_of(&value)?;
    Ok(Password::new(move || Ok(password.clone())))
}

fn bytes_of(value: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    if let Ok(text) = value.cast::<PyString>() {
        return Ok(text.to_cow()?.as_bytes().to_vec());
    }
    if let Ok(bytes) = value.cast::<PyBytes>() {
        return Ok(bytes.as_bytes().to_vec());
    }
    let kind = value.get_type().name()?.to_string();
    value.extract::<Vec<u8>>().map_err(|_| {
        PyTypeError::new_err(format!(
            "a password must be str or bytes, or a function returning one, not {kind}"
        ))
    })
}

fn version_of(name: &str) -> PyResult<TlsVersion> {
    match name {
        "TLSv1.2" => Ok(TlsVersion::Tls12),
        "TLSv1.3" => Ok(TlsVersion::Tls13),
        _ => Err(PyValueError::new_err(format!("{name:?} is no TLS version: use 'TLSv1.2' or 'TLSv1.3'"))),
    }
}

/// As the `ssl` module has it: `FileNotFoundError` and its like for files, `ssl.SSLError` for what is in them.
fn raise(error: TlsError) -> PyErr {
    match &error {
        TlsError::Read { source, .. } => match source.raw_os_error() {
            Some(number) => PyOSError::new_err((number, error.to_string())),
            None => PyOSError::new_err(error.to_string()),
        },
        TlsError::AuthenticateWord(_) | TlsError::HostName(_) => PyValueError::new_err(error.to_string()),
        // With a number, or its text would be shown as a tuple: 1 is `ssl.SSL_ERROR_SSL`.
        _ => raised::SSLError::new_err((1, error.to_string())),
    }
}
