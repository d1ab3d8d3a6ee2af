//! The extension module `zeo_rs._zeo`. pyo3 only here: converts, releases the GIL, maps errors. No logic.
//! One file per class, each with a `register(m)`.

mod aio;
mod cache_tools;
mod check;
mod client_callbacks;
mod client_errors;
mod client_storage;
mod convert;
mod errors;
mod file_storage;
mod logging;
mod pack;
mod records;
mod resolver;
mod served_storage;
mod server;
mod tls;
mod values;

use pyo3::prelude::*;

#[pymodule]
fn _zeo(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    logging::register(m)?;
    aio::register(m)?;
    client_storage::register(m)?;
    cache_tools::register(m)?;
    file_storage::register(m)?;
    pack::register(m)?;
    check::register(m)?;
    server::register(m)?;
    tls::register(m)?;
    Ok(())
}
