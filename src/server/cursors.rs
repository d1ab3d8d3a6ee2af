//! `iterator_*`: a connection's cursors over transactions and their records.
//!
//! Reading may wait for the disk, so all cursors of a connection go to a worker thread for each call and come back with
//! its answer; calls made meanwhile wait in a queue, in order.

use std::collections::HashMap;
use std::sync::Arc;

use super::fault;
use super::hub::Hub;
use super::session::{Outcome, ReplyTo, Served, Session};
use crate::ids::Tid;
use crate::pickle::Value;
use crate::storage::{RecordIterator, Storage, StorageError, TxnIterator};
use crate::wire::Fault;

/// Calls of one client that may wait for another.
const MAX_WAITING: usize = 10_000;

pub(crate) enum CursorCall {
    Start { start: Option<Tid>, stop: Option<Tid> },
    Next { iid: i64 },
    RecordStart { txn_iid: i64, tid: Tid },
    RecordNext { iid: i64 },
    Forget { iids: Vec<i64> },
}

enum Cursor {
    Transactions { iter: Box<dyn TxnIterator>, current: Option<(Tid, Option<Box<dyn RecordIterator>>)> },
    Records(Box<dyn RecordIterator>),
}

/// Open cursors by id. Ids count up from 0 and are shared between both kinds.
pub(crate) struct Cursors {
    open: HashMap<i64, Cursor>,
    next: i64,
    /// That may be open.
    limit: usize,
}

impl Cursors {
    pub(crate) fn new(limit: usize) -> Self {
        Self { open: HashMap::new(), next: 0, limit }
    }

    fn add(&mut self, cursor: Cursor) -> Result<Value, Fault> {
        if self.open.len() >= self.limit {
            let limit = self.limit;
            let text =
                format!("more than {limit} iterators are open (max-iterators); exhaust or collect some");
            return Err(Fault::value_error(text));
        }
        let iid = self.next;
        self.next += 1;
        self.open.insert(iid, cursor);
        Ok(iid.into())
    }

    /// Iterations end at `view`, as that of the connection was when they began.
    fn serve(&mut self, storage: &dyn Storage, view: Tid, call: CursorCall) -> Result<Value, Fault> {
        let failed = |error: StorageError| fault::of(&error);
        let unknown = |iid: i64| Fault::key_error(iid.into());
        match call {
            CursorCall::Start { start, stop } => {
                let stop = stop.map_or(view, |stop| stop.min(view));
                let iter = storage.iterate(start, Some(stop)).map_err(failed)?;
                self.add(Cursor::Transactions { iter, current: None })
            }
            CursorCall::Next { iid } => {
                let Some(Cursor::Transactions { iter, current }) = self.open.get_mut(&iid) else {
                    return Err(unknown(iid));
                };
                let Some((info, records)) = iter.next_txn().map_err(failed)? else {
                    self.open.remove(&iid);
                    return Ok(Value::None);
                };
                *current = Some((info.tid, Some(records)));
                Ok(Value::Tuple(vec![
                    info.tid.into(),
                    char::from(info.status).to_string().into(),
                    info.meta.user.into(),
                    info.meta.description.into(),
                    Value::Dict(fault::extension(&info.meta.extension)),
                ]))
            }
            CursorCall::RecordStart { txn_iid, tid } => {
                let Some(Cursor::Transactions { current, .. }) = self.open.get_mut(&txn_iid) else {
                    return Err(unknown(txn_iid));
                };
                let records = match current {
                    Some((current, records)) if *current == tid => records.take(),
                    _ => {
                        let text = "Out-of-order request for record iterator for transaction";
                        return Err(Fault::new("builtins.Exception", format!("{text} {tid}")));
                    }
                };
                let records = match records {
                    Some(records) => records,
                    // The second reader of one transaction.
                    None => match storage
                        .iterate(Some(tid), Some(tid))
                        .map_err(failed)?
                        .next_txn()
                        .map_err(failed)?
                    {
                        Some((_, records)) => records,
                        None => return Err(unknown(txn_iid)),
                    },
                };
                self.add(Cursor::Records(records))
            }
            CursorCall::RecordNext { iid } => {
                let Some(Cursor::Records(records)) = self.open.get_mut(&iid) else {
                    return Err(unknown(iid));
                };
                let Some(record) = records.next_record().map_err(failed)? else {
                    self.open.remove(&iid);
                    return Ok(Value::None);
                };
                Ok(Value::Tuple(vec![
                    record.oid.into(),
                    record.tid.into(),
                    record.data.into(),
                    record.data_txn.into(),
                ]))
            }
            CursorCall::Forget { iids } => {
                for iid in iids {
                    self.open.remove(&iid);
                }
                Ok(Value::None)
            }
        }
    }
}

impl Session {
    pub(crate) fn cursor_call(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, call: CursorCall) -> Served {
        if self.cursor_calls.len() >= MAX_WAITING {
            self.close("it made too many iterator calls without waiting for their answers");
            return Ok(Outcome::Later);
        }
        self.cursor_calls.push_back((to.take(), call));
        self.next_cursor_call(hub);
        Ok(Outcome::Later)
    }

    fn next_cursor_call(&mut self, hub: &Arc<Hub>) {
        if self.cursors.is_none() {
            return;
        }
        let Some((to, call)) = self.cursor_calls.pop_front() else { return };
        let Some(mut cursors) = self.cursors.take() else { return };
        let (storage, hub, view) = (Arc::clone(&hub.storage), Arc::clone(hub), self.view);
        self.background(
            move || {
                let served = cursors.serve(&*storage, view, call);
                (cursors, served)
            },
            move |session, (cursors, served)| {
                session.cursors = Some(cursors);
                session.answer(to, served.map(Outcome::Reply));
                session.next_cursor_call(&hub);
            },
        );
    }
}
