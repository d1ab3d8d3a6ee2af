//! [`PythonResolver`]: conflict resolution with the application's classes, for the server. The Python side is `resolve` in
//! `zeo_rs/_served.py`.

use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::convert::{data_arg, oid_bytes, tid_bytes};
use crate::storage::{Conflict, ConflictResolver, Resolution, Storage};

/// Conflict resolution with the application's classes, by ZODB's own code. Loads both revisions, then one call with the GIL.
#[derive(Debug)]
pub(crate) struct PythonResolver;

impl ConflictResolver for PythonResolver {
    fn resolve(
        &self,
        storage: &dyn Storage,
        conflict: &Conflict,
        committed_data: Option<Bytes>,
    ) -> Resolution {
        let read_data = storage.load_serial(conflict.oid, conflict.read);
        let committed_data =
            committed_data.map_or_else(|| storage.load_serial(conflict.oid, conflict.committed), Ok);
        let (Ok(read_data), Ok(committed_data)) = (read_data, committed_data) else {
            return Resolution::Unresolved;
        };
        let merged = Python::attach(|py| -> PyResult<Option<Bytes>> {
            let answer = py.import("zeo_rs._served")?.getattr("resolve")?.call1((
                oid_bytes(py, conflict.oid),
                tid_bytes(py, conflict.committed),
                tid_bytes(py, conflict.read),
                PyBytes::new(py, &conflict.data),
                PyBytes::new(py, &read_data),
                PyBytes::new(py, &committed_data),
            ))?;
            if answer.is_none() { Ok(None) } else { data_arg(&answer).map(Some) }
        });
        match merged {
            Ok(Some(record)) => Resolution::Resolved(record),
            Ok(None) => Resolution::Unresolved,
            Err(error) => {
                tracing::error!(oid = %conflict.oid, %error, "conflict resolution failed");
                Resolution::Unresolved
            }
        }
    }
}
