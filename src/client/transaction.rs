//! The transaction being committed: one at a time per client, bound to the connection it began on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use rustc_hash::{FxHashMap, FxHashSet};

use super::error::CallbackError;
use crate::cache::Cache;
use crate::ids::{Oid, Tid};
use crate::wire::TxnKey;

pub type FinishCallback = Box<dyn FnOnce(Tid) -> Result<(), CallbackError> + Send>;

/// Who has the turn to commit.
pub(super) enum Place {
    /// `tpc_begin` waits for a connection, without the lock: nobody else has to wait to be told that it is not his turn.
    Beginning {
        key: TxnKey,
        /// Another thread has called `tpc_abort`: it is not to begin.
        aborted: bool,
    },
    Open(Txn),
}

impl Place {
    pub(super) fn key(&self) -> &TxnKey {
        match self {
            Self::Beginning { key, .. } => key,
            Self::Open(txn) => &txn.key,
        }
    }
}

/// What `tpc_finish` will put in the cache.
pub(super) struct Txn {
    pub(super) key: TxnKey,
    /// Connection on which it began; on any other it is poisoned.
    pub(super) generation: u64,
    /// Last state stored for each object; `None`: changed, but not to what was sent (deleted, restored, too large
    /// to keep).
    stores: FxHashMap<Oid, Option<Bytes>>,
    /// Objects whose committed state is not what was sent: resolved by the server, or undone.
    resolved: FxHashSet<Oid>,
    kept: usize,
    keep_at_most: usize,
    /// Calls that are being sent, without the lock. Of calls that overlap it is not known which the server gets last.
    sending: Arc<AtomicUsize>,
    /// The vote ended in a conflict, which has ended it on the server.
    pub(super) refused: bool,
}

impl Txn {
    pub(super) fn new(key: TxnKey, generation: u64, keep_at_most: usize) -> Self {
        Self {
            key,
            generation,
            stores: FxHashMap::default(),
            resolved: FxHashSet::default(),
            kept: 0,
            keep_at_most,
            sending: Arc::default(),
            refused: false,
        }
    }

    /// A call of it is about to be sent, until that is dropped.
    pub(super) fn sending(&self) -> Sending {
        self.sending.fetch_add(1, Ordering::AcqRel);
        Sending(self.sending.clone())
    }

    /// The last store of an object counts. To be called after [`Self::sending`].
    pub(super) fn stored(&mut self, oid: Oid, data: &Bytes) {
        let alone = self.sending.load(Ordering::Acquire) <= 1;
        let fits = alone && self.kept + data.len() <= self.keep_at_most;
        if fits {
            self.kept += data.len();
        }
        if let Some(Some(old)) = self.stores.insert(oid, fits.then(|| data.clone())) {
            self.kept -= old.len();
        }
    }

    pub(super) fn changed(&mut self, oid: Oid) {
        self.stores.insert(oid, None);
    }

    pub(super) fn resolved(&mut self, oid: Oid) {
        self.resolved.insert(oid);
    }

    pub(super) fn take_finish(&mut self, callback: FinishCallback) -> Finish {
        if self.sending.load(Ordering::Acquire) > 0 {
            // A store of another thread may come too late to be part of it.
            self.stores.values_mut().for_each(|data| *data = None);
        }
        Finish {
            stores: std::mem::take(&mut self.stores),
            resolved: std::mem::take(&mut self.resolved),
            callback,
        }
    }
}

/// A call on its way.
pub(super) struct Sending(Arc<AtomicUsize>);

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What to do with the answer to `tpc_finish`.
pub(super) struct Finish {
    stores: FxHashMap<Oid, Option<Bytes>>,
    resolved: FxHashSet<Oid>,
    pub(super) callback: FinishCallback,
}

impl Finish {
    pub(super) fn store_in(&self, cache: &Cache, tid: Tid) {
        for oid in &self.resolved {
            cache.invalidate(*oid, Some(tid));
        }
        for (oid, data) in &self.stores {
            cache.invalidate(*oid, Some(tid));
            if let (Some(data), false) = (data, self.resolved.contains(oid)) {
                cache.store(*oid, tid, None, data);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pickle::Value;

    fn kept(txn: &Txn, oid: u64) -> Option<&[u8]> {
        txn.stores.get(&Oid(oid)).and_then(|data| data.as_deref())
    }

    #[test]
    fn stores_of_threads_that_overlap_are_not_kept() {
        let mut txn = Txn::new(Value::Int(1), 1, 1000);
        let one = txn.sending();
        txn.stored(Oid(1), &Bytes::from_static(b"first"));
        let two = txn.sending();
        txn.stored(Oid(1), &Bytes::from_static(b"second"));
        assert_eq!(kept(&txn, 1), None, "which of them the server got last is not known");
        drop((one, two));
        let _three = txn.sending();
        txn.stored(Oid(1), &Bytes::from_static(b"third"));
        assert_eq!(kept(&txn, 1), Some(&b"third"[..]));
        let finish = txn.take_finish(Box::new(|_| Ok(())));
        assert_eq!(finish.stores.get(&Oid(1)), Some(&None), "it is still on its way");
    }
}
