//! Iteration over transactions and their data records, with the attributes of ZODB's own iterators.
//!
//! Cost of a record: one object with its bytes made once; the GIL is kept, since records come from a piece of the file
//! that was read ahead.

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::convert::{OrRaise, oid_bytes, tid_bytes};
use crate::ids::Tid;
use crate::storage::{RecordInfo, RecordIterator, TxnIterator};

/// Iterator over `(tid, status, user, description, extension, Records)`.
#[pyclass(frozen, module = "zeo_rs._zeo", name = "_Transactions")]
pub(crate) struct Transactions {
    /// `None` after the end and after `close`.
    transactions: Mutex<Option<Box<dyn TxnIterator>>>,
}

impl Transactions {
    pub(crate) fn new(transactions: Box<dyn TxnIterator>) -> Self {
        Self { transactions: Mutex::new(Some(transactions)) }
    }
}

#[pymethods]
impl Transactions {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let mut transactions = self.transactions.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(next) = transactions.as_mut().map(|transactions| transactions.next_txn()) else {
            return Ok(None);
        };
        let Some((info, records)) = next.or_raise(py)? else {
            *transactions = None;
            return Ok(None);
        };
        let bytes = |bytes: &[u8]| PyBytes::new(py, bytes);
        let (user, description) = (bytes(&info.meta.user), bytes(&info.meta.description));
        let (status, extension) = (char::from(info.status), bytes(&info.meta.extension));
        let records = Records { again: Mutex::new(records.again()), first: Mutex::new(Some(records)) };
        (tid_bytes(py, info.tid), status, user, description, extension, records).into_pyobject(py).map(Some)
    }

    fn close(&self) {
        *self.transactions.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The records of one transaction. Each `iter()` starts anew.
#[pyclass(frozen, module = "zeo_rs._zeo", name = "_Records")]
pub(crate) struct Records {
    /// The reader that came with the transaction, with what was read ahead, until it is used.
    first: Mutex<Option<Box<dyn RecordIterator>>>,
    /// Knows where the others begin.
    again: Mutex<Option<Box<dyn RecordIterator>>>,
}

#[pymethods]
impl Records {
    fn __iter__(&self) -> RecordReader {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let again = || self.again.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.again();
        RecordReader(Mutex::new(Reading { records: first.or_else(again), tid: None }))
    }
}

/// Iterator over the records of one transaction; empty from its end on. A record costs a copy of its data, and the objects
/// of [`Record`]; the GIL is kept: what is not in memory is read in pieces of many records.
#[pyclass(frozen, module = "zeo_rs._zeo", name = "_RecordReader")]
pub(crate) struct RecordReader(Mutex<Reading>);

struct Reading {
    records: Option<Box<dyn RecordIterator>>,
    /// The tid of the last record: the next one has the same, but for restored revisions.
    tid: Option<(Tid, Py<PyBytes>)>,
}

#[pymethods]
impl RecordReader {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Record>> {
        let mut reading = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Reading { records, tid } = &mut *reading;
        let Some(next) = records.as_mut().map(|records| records.next_record()) else { return Ok(None) };
        let Some(record) = next.or_raise(py)? else {
            *records = None;
            return Ok(None);
        };
        let made = tid.take_if(|(known, _)| *known == record.tid);
        let (_, made) = tid.insert(made.unwrap_or_else(|| (record.tid, tid_bytes(py, record.tid).unbind())));
        Ok(Some(Record::new(py, &record, made.clone_ref(py))))
    }
}

/// One data record (`IStorageRecordInformation`). Wrapping storages put their transformed data into it.
#[pyclass(get_all, set_all, module = "zeo_rs._zeo")]
pub(crate) struct Record {
    oid: Py<PyBytes>,
    tid: Py<PyBytes>,
    /// None: the object does not exist as of this transaction.
    data: Option<Py<PyBytes>>,
    /// Tid of the transaction that holds the data, if the record only points to it.
    data_txn: Option<Py<PyBytes>>,
}

impl Record {
    /// `tid`: that of the record.
    fn new(py: Python<'_>, record: &RecordInfo, tid: Py<PyBytes>) -> Self {
        Self {
            oid: oid_bytes(py, record.oid).unbind(),
            tid,
            data: record.data.as_ref().map(|data| PyBytes::new(py, data).unbind()),
            data_txn: record.data_txn.map(|tid| tid_bytes(py, tid).unbind()),
        }
    }
}

#[pymethods]
impl Record {
    /// Versions are history.
    #[getter]
    fn version(&self) -> &'static str {
        ""
    }
}
