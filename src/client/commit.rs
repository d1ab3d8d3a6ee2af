//! Two-phase commit: one transaction of a client at a time, on the connection it began on.

use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};

use bytes::Bytes;

use super::connection::Connection;
use super::transaction::{FinishCallback, Txn};
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
        let mut txn = self.txn();
        loop {
            match &*txn {
                None => break,
                Some(open) if open.key == key => {
                    return Err(ClientError::Transaction(
                        "Duplicate tpc_begin calls for same transaction".into(),
                    ));
                }
                Some(_) => {}
            }
            if self.is_closing() {
                return Err(ClientError::disconnected("closed"));
            }
            (txn, _) = self.txn_ended.wait_timeout(txn, LOOK_AGAIN).unwrap_or_else(PoisonError::into_inner);
            if txn.is_some() {
                drop(txn);
                self.core.check_interrupt()?;
                txn = self.txn();
            }
        }
        // Held while waiting for a connection: whoever wants it waits for its turn in any case.
        let connection = self.operational(Some(self.options.wait_timeout), false)?;
        connection.send_async(&Call::TpcBegin {
            txn: key.clone(),
            user,
            description,
            extension,
            tid,
            status,
        })?;
        *txn = Some(Txn::new(key, connection.generation, self.core.cache.max_bytes() / 2));
        Ok(())
    }

    pub fn store(&self, key: &TxnKey, oid: Oid, serial: Tid, data: Bytes) -> Result<()> {
        self.in_txn("store", key, |connection, txn| {
            txn.stored(oid, &data);
            connection.send_async(&Call::Storea { oid, serial, data, txn: key.clone() })
        })
    }

    pub fn check_current(&self, key: &TxnKey, oid: Oid, serial: Tid) -> Result<()> {
        self.in_txn("checkCurrentSerialInTransaction", key, |connection, _| {
            connection.send_async(&Call::CheckCurrentSerial { oid, serial, txn: key.clone() })
        })
    }

    pub fn delete_object(&self, key: &TxnKey, oid: Oid, serial: Tid) -> Result<()> {
        self.in_txn("deleteObject", key, |connection, txn| {
            txn.changed(oid);
            connection.send_async(&Call::DeleteObject { oid, serial, txn: key.clone() })
        })
    }

    pub fn restore(
        &self,
        key: &TxnKey,
        oid: Oid,
        serial: Tid,
        data: Option<Bytes>,
        prev_txn: Option<Tid>,
    ) -> Result<()> {
        self.in_txn("restore", key, |connection, txn| {
            txn.changed(oid);
            connection.send_async(&Call::Restorea { oid, serial, data, prev_txn, txn: key.clone() })
        })
    }

    pub fn undo(&self, key: &TxnKey, trans_id: Bytes) -> Result<()> {
        self.in_txn("undo", key, |connection, _| {
            connection.send_async(&Call::Undoa { trans_id, txn: key.clone() })
        })
    }

    /// `store`, then the blob in `path`, chunk by chunk.
    pub fn store_blob(&self, key: &TxnKey, oid: Oid, serial: Tid, data: Bytes, path: &Path) -> Result<()> {
        let upload = blob::Upload::open(path, oid, serial, data.clone(), key.clone())?;
        self.in_txn("storeBlob", key, |connection, txn| {
            txn.stored(oid, &data);
            connection.send_async(&Call::Storea { oid, serial, data, txn: key.clone() })?;
            connection.send_upload(&upload)
        })
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
        self.in_txn("storeBlob", key, |connection, txn| {
            txn.stored(oid, &data);
            connection.send_async(&Call::Storea { oid, serial, data: data.clone(), txn: key.clone() })?;
            connection.send_async(&Call::StoreBlobShared { oid, serial, data, filename, txn: key.clone() })
        })
    }

    /// The server's answer: oids that it resolved or undid, and conflicts that the client is to resolve.
    pub fn tpc_vote(&self, key: &TxnKey) -> Result<Vec<Value>> {
        self.may_wait("tpc_vote")?;
        let connection = self.in_txn("tpc_vote", key, |connection, _| Ok(connection.clone()))?;
        let answer = connection.call(&Call::Vote { txn: key.clone() }).inspect_err(|error| {
            // What the cache has of that object led to the conflict: it must not do so again.
            if let ClientError::Fault(fault) = error
                && fault.class.ends_with("ConflictError")
                && let Some(oid) = fault_oid(&fault.data)
            {
                self.core.cache.invalidate(oid, None);
            }
            if let (ClientError::Fault(fault), Some(txn)) = (error, &mut *self.txn()) {
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
        self.in_txn("tpc_vote", key, |_, txn| {
            for item in &answer {
                if let Some(oid) = oid_of(item) {
                    txn.resolved(oid);
                }
            }
            Ok(())
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
        let (connection, finish) = self.in_txn("tpc_finish", key, |connection, txn| {
            Ok((connection.clone(), txn.take_finish(callback)))
        })?;
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
        let (generation, refused) = match &*self.txn() {
            Some(txn) if txn.key == *key => (txn.generation, txn.refused),
            _ => return Ok(()),
        };
        let abort = Call::TpcAbort { txn: key.clone() };
        let aborted = if refused {
            self.in_txn("tpc_abort", key, |connection, _| connection.send_async(&abort)).map(|()| Value::None)
        } else {
            self.call_on(generation, "tpc_abort", &abort)
        };
        self.end_txn(key);
        match aborted {
            Ok(_) | Err(ClientError::Disconnected(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// True while `key` is the transaction being committed.
    pub fn is_committing(&self, key: &TxnKey) -> bool {
        self.txn().as_ref().is_some_and(|txn| txn.key == *key)
    }

    /// Something about the transaction being committed, on the connection it began on.
    fn in_txn<T>(
        &self,
        method: &'static str,
        key: &TxnKey,
        run: impl FnOnce(&Arc<Connection>, &mut Txn) -> Result<T>,
    ) -> Result<T> {
        let mut place = self.txn();
        let Some(txn) = place.as_mut().filter(|txn| txn.key == *key) else {
            return Err(wrong_txn(method));
        };
        let poisoned = || ClientError::disconnected(format!("{method} on a disconnected transaction"));
        let connection = self.operational(None, false).map_err(|error| match error {
            ClientError::Disconnected(_) => poisoned(),
            other => other,
        })?;
        if connection.generation != txn.generation {
            return Err(poisoned());
        }
        run(&connection, txn)
    }

    /// The next transaction may begin.
    fn end_txn(&self, key: &TxnKey) {
        self.txn().take_if(|txn| txn.key == *key);
        self.txn_ended.notify_all();
    }

    fn txn(&self) -> MutexGuard<'_, Option<Txn>> {
        self.txn.lock().unwrap_or_else(PoisonError::into_inner)
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
