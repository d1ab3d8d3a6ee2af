//! Two-phase commit: one transaction of a client at a time, on the connection it began on.

use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};

use bytes::Bytes;

use super::connection::Connection;
use super::transaction::{FinishCallback, Place, Txn};
use super::{Client, ClientError, LOOK_AGAIN, Result, blob, dial, oid_of};
use crate::ids::{Oid, Tid};
use crate::pickle::Value;
use crate::wire::{Call, TxnKey};

impl Client {
    /// Waits until no other transaction of this client is being committed, and for a connection.
    ///
    /// # Errors
    /// [`ClientError::Transaction`] if `key` is the transaction being committed already.
    #[allow(clippy::too_many_arguments)]
    pub fn tpc_begin(
        &self,
        key: TxnKey,
        user: Bytes,
        description: Bytes,
        extension: Value,
        tid: Option<Tid>,
        status: u8,
    ) -> Result<()> {
        self.may_wait("tpc_begin")?;
        if self.is_read_only() {
            return Err(ClientError::ReadOnly);
        }
        self.take_turn(&key)?;
        let mut turn = Turn { client: self, key: &key, is_open: false };
        // Without the lock: whoever asks meanwhile whether it is his turn is told at once that it is not.
        let connection = self.operational(Some(self.options.wait_timeout), false)?;
        turn.check()?;
        let call = Call::TpcBegin { txn: key.clone(), user, description, extension, tid, status };
        connection.send_async(&call).inspect_err(|error| {
            if matches!(error, ClientError::Callback(_)) {
                // A signal ended the waiting behind another writer; the call stays, and goes with what that one writes next.
                let _ = connection.send_async(&Call::TpcAbort { txn: key.clone() });
            }
        })?;
        let txn = Txn::new(key.clone(), connection.generation, self.core.cache.max_bytes() / 2);
        turn.open(txn).inspect_err(|_| {
            // Should that fail, the connection is gone, and with it the transaction.
            let _ = connection.send_async(&Call::TpcAbort { txn: key.clone() });
        })
    }

    /// Waits until nobody commits, and has the place kept for `key`.
    fn take_turn(&self, key: &TxnKey) -> Result<()> {
        let mut place = self.place();
        loop {
            match &*place {
                None => break,
                Some(taken) if taken.key() == key => {
                    return Err(ClientError::Transaction(
                        "Duplicate tpc_begin calls for same transaction".into(),
                    ));
                }
                Some(_) => {}
            }
            if self.is_closing() {
                return Err(ClientError::disconnected("closed"));
            }
            (place, _) =
                self.txn_ended.wait_timeout(place, LOOK_AGAIN).unwrap_or_else(PoisonError::into_inner);
            if place.is_some() {
                drop(place);
                self.core.check_interrupt()?;
                place = self.place();
            }
        }
        *place = Some(Place::Beginning { key: key.clone(), aborted: false });
        Ok(())
    }

    pub fn store(&self, key: &TxnKey, oid: Oid, serial: Tid, data: Bytes) -> Result<()> {
        let call = Call::Storea { oid, serial, data: data.clone(), txn: key.clone() };
        self.send_in_txn(
            "store",
            key,
            |txn| txn.stored(oid, &data),
            |connection| connection.send_async(&call),
        )
    }

    pub fn check_current(&self, key: &TxnKey, oid: Oid, serial: Tid) -> Result<()> {
        let call = Call::CheckCurrentSerial { oid, serial, txn: key.clone() };
        let method = "checkCurrentSerialInTransaction";
        self.send_in_txn(method, key, |_| {}, |connection| connection.send_async(&call))
    }

    pub fn delete_object(&self, key: &TxnKey, oid: Oid, serial: Tid) -> Result<()> {
        let call = Call::DeleteObject { oid, serial, txn: key.clone() };
        self.send_in_txn(
            "deleteObject",
            key,
            |txn| txn.changed(oid),
            |connection| connection.send_async(&call),
        )
    }

    pub fn restore(
        &self,
        key: &TxnKey,
        oid: Oid,
        serial: Tid,
        data: Option<Bytes>,
        prev_txn: Option<Tid>,
    ) -> Result<()> {
        let call = Call::Restorea { oid, serial, data, prev_txn, txn: key.clone() };
        self.send_in_txn("restore", key, |txn| txn.changed(oid), |connection| connection.send_async(&call))
    }

    pub fn undo(&self, key: &TxnKey, trans_id: Bytes) -> Result<()> {
        let call = Call::Undoa { trans_id, txn: key.clone() };
        self.send_in_txn("undo", key, |_| {}, |connection| connection.send_async(&call))
    }

    /// `store`, then the blob in `path`, chunk by chunk.
    pub fn store_blob(&self, key: &TxnKey, oid: Oid, serial: Tid, data: Bytes, path: &Path) -> Result<()> {
        let upload = blob::Upload::open(path, oid, serial, data.clone(), key.clone())?;
        let call = Call::Storea { oid, serial, data: data.clone(), txn: key.clone() };
        let send = |connection: &Connection| {
            connection.send_async(&call)?;
            connection.send_upload(&upload)
        };
        self.send_in_txn("storeBlob", key, |txn| txn.stored(oid, &data), send)
    }

    /// `store` with a blob that lies in the server's own directory already.
    pub fn store_blob_shared(
        &self,
        key: &TxnKey,
        oid: Oid,
        serial: Tid,
        data: Bytes,
        filename: String,
    ) -> Result<()> {
        let send = |connection: &Connection| {
            connection.send_async(&Call::Storea { oid, serial, data: data.clone(), txn: key.clone() })?;
            let data = data.clone();
            connection.send_async(&Call::StoreBlobShared { oid, serial, data, filename, txn: key.clone() })
        };
        self.send_in_txn("storeBlob", key, |txn| txn.stored(oid, &data), send)
    }

    /// The server's answer: oids that it resolved or undid, and conflicts that the client is to resolve.
    pub fn tpc_vote(&self, key: &TxnKey) -> Result<Vec<Value>> {
        self.may_wait("tpc_vote")?;
        let connection = self.in_txn("tpc_vote", key, |_| {})?.0;
        let answer = connection.call(&Call::Vote { txn: key.clone() }).inspect_err(|error| {
            // What the cache has of that object led to the conflict: it must not do so again.
            if let ClientError::Fault(fault) = error
                && fault.class.ends_with("ConflictError")
                && let Some(oid) = fault_oid(&fault.data)
            {
                self.core.cache.invalidate(oid, None);
            }
            if let (ClientError::Fault(fault), Some(Place::Open(txn))) = (error, &mut *self.place()) {
                txn.refused = txn.key == *key && fault.class.ends_with("ConflictError");
            }
        })?;
        let answer = match answer {
            Value::Tuple(items) | Value::List(items) => items,
            Value::None => Vec::new(),
            other => {
                return Err(ClientError::UnexpectedAnswer { call: "vote", problem: format!("{other:?}") });
            }
        };
        self.in_txn("tpc_vote", key, |txn| {
            answer.iter().filter_map(oid_of).for_each(|oid| txn.resolved(oid));
        })?;
        Ok(answer)
    }

    /// Commits. `callback` runs on whatever thread reads the answer, before the last tid moves and before any later
    /// message; it must not call the server.
    ///
    /// # Errors
    /// [`ClientError::Disconnected`]: it is unknown whether the transaction was committed. After any error the
    /// connection is given up, because cache and server may disagree.
    pub fn tpc_finish(&self, key: &TxnKey, callback: FinishCallback) -> Result<Tid> {
        self.may_wait("tpc_finish")?;
        let (connection, finish) = self.in_txn("tpc_finish", key, |txn| txn.take_finish(callback))?;
        // Until the answer is there the next transaction waits: a server may take the calls of a connection
        // side by side.
        let answer = connection.finish(&Call::TpcFinish { txn: key.clone() }, finish);
        self.end_txn(key);
        let answer = answer?;
        dial::tid_of(&answer)
            .ok_or(ClientError::UnexpectedAnswer { call: "tpc_finish", problem: "no tid".into() })
    }

    /// Ends the transaction on both sides. Without a connection there is nothing to tell the server.
    ///
    /// A server has ended a transaction that it refused for a conflict: it is told all the same, with the next call.
    pub fn tpc_abort(&self, key: &TxnKey) -> Result<()> {
        let (generation, refused) = match &mut *self.place() {
            Some(Place::Open(txn)) if txn.key == *key => (txn.generation, txn.refused),
            Some(Place::Beginning { key: beginning, aborted }) if beginning == key => {
                // The thread that begins it sees to the rest.
                *aborted = true;
                return Ok(());
            }
            _ => return Ok(()),
        };
        let abort = Call::TpcAbort { txn: key.clone() };
        let aborted = if refused {
            self.send_in_txn("tpc_abort", key, |_| {}, |connection| connection.send_async(&abort))
                .map(|()| Value::None)
        } else {
            self.call_on(generation, "tpc_abort", &abort)
        };
        self.end_txn(key);
        match aborted {
            Ok(_) | Err(ClientError::Disconnected(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// True while `key` is the transaction being committed. Waits for nothing, so it may be asked with the GIL held.
    pub fn is_committing(&self, key: &TxnKey) -> bool {
        matches!(&*self.place(), Some(Place::Open(txn)) if txn.key == *key)
    }

    /// Notes something about the transaction being committed. Its connection, if that is still the one it began on.
    ///
    /// `note` must not wait: the lock is held, for which others wait with the GIL.
    fn in_txn<T>(
        &self,
        method: &'static str,
        key: &TxnKey,
        note: impl FnOnce(&mut Txn) -> T,
    ) -> Result<(Arc<Connection>, T)> {
        let mut place = self.place();
        let txn = match &mut *place {
            Some(Place::Open(txn)) if txn.key == *key => txn,
            _ => return Err(wrong_txn(method)),
        };
        let poisoned = || ClientError::disconnected(format!("{method} on a disconnected transaction"));
        let connection = self.operational(None, false).map_err(|error| match error {
            ClientError::Disconnected(_) => poisoned(),
            other => other,
        })?;
        if connection.generation != txn.generation {
            return Err(poisoned());
        }
        let noted = note(txn);
        Ok((connection, noted))
    }

    /// Notes it, then sends it, without the lock: a server that does not read keeps nobody from aborting.
    fn send_in_txn(
        &self,
        method: &'static str,
        key: &TxnKey,
        note: impl FnOnce(&mut Txn),
        send: impl FnOnce(&Connection) -> Result<()>,
    ) -> Result<()> {
        let (connection, _sending) = self.in_txn(method, key, |txn| {
            let sending = txn.sending();
            note(txn);
            sending
        })?;
        send(&connection)
    }

    /// The next transaction may begin.
    fn end_txn(&self, key: &TxnKey) {
        self.place().take_if(|place| place.key() == key);
        self.txn_ended.notify_all();
    }

    /// Held for a few instructions only.
    fn place(&self) -> MutexGuard<'_, Option<Place>> {
        self.txn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place kept for a transaction that begins: at the end it is open, or whoever waits may begin.
struct Turn<'a> {
    client: &'a Client,
    key: &'a TxnKey,
    is_open: bool,
}

impl Turn<'_> {
    /// An error if another thread has aborted it meanwhile.
    fn check(&self) -> Result<()> {
        if matches!(&*self.client.place(), Some(Place::Beginning { aborted: false, .. })) {
            return Ok(());
        }
        Err(ClientError::Transaction(
            "tpc_begin: another thread has aborted the transaction meanwhile".into(),
        ))
    }

    fn open(&mut self, txn: Txn) -> Result<()> {
        let mut place = self.client.place();
        if let Some(Place::Beginning { aborted: false, .. }) = &*place {
            *place = Some(Place::Open(txn));
            self.is_open = true;
        }
        drop(place);
        if self.is_open { Ok(()) } else { self.check() }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.is_open {
            self.client.end_txn(self.key);
        }
    }
}

fn wrong_txn(method: &'static str) -> ClientError {
    ClientError::Transaction(format!("{method}: this transaction is not the one being committed"))
}

/// `oid` of a conflict error's attributes.
fn fault_oid(data: &Value) -> Option<Oid> {
    let Value::Dict(pairs) = data else { return None };
    let (_, oid) = pairs.iter().find(|(key, _)| matches!(key, Value::Str(text) if text == "oid"))?;
    oid_of(oid)
}
