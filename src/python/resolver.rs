//! [`PythonResolver`]: conflict resolution with the application's classes, for the server. The Python side is `resolve` in
//! `zeo_rs/_served.py`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use rustc_hash::FxHashSet;

use super::convert::{data_arg, oid_bytes, tid_bytes};
use crate::pickle::class_of;
use crate::storage::{Conflict, ConflictResolver, Resolution, Storage};

/// More class names than any application has are not remembered: clients choose them.
const MAX_CLASSES: usize = 10_000;

/// Conflict resolution with the application's classes, by ZODB's own code. Loads both revisions, then one call with the GIL;
/// neither for a class that is known not to resolve conflicts, as most are (ZODB remembers them as well).
#[derive(Debug, Default)]
pub(crate) struct PythonResolver {
    /// Module and name.
    unresolvable: Mutex<FxHashSet<(String, String)>>,
}

impl PythonResolver {
    fn unresolvable(&self) -> MutexGuard<'_, FxHashSet<(String, String)>> {
        self.unresolvable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the class of a record that was not resolved, if ZODB says that it never is.
    fn remember(&self, record: &[u8]) {
        let Some((module, name)) = class_of(record) else { return };
        let never = Python::attach(|py| -> PyResult<bool> {
            py.import("zeo_rs._served")?.getattr("is_unresolvable")?.call1((&module, &name))?.extract()
        });
        let mut known = self.unresolvable();
        if never.unwrap_or(false) && known.len() < MAX_CLASSES {
            known.insert((module, name));
        }
    }
}

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
            Ok(None) => {
                self.remember(&conflict.data);
                Resolution::Unresolved
            }
            Err(error) => {
                tracing::error!(oid = %conflict.oid, %error, "conflict resolution failed");
                Resolution::Unresolved
            }
        }
    }

    fn may_resolve(&self, record: &[u8]) -> bool {
        class_of(record).is_none_or(|class| !self.unresolvable().contains(&class))
    }
}
