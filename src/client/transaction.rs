//! The transaction being committed: one at a time per client, bound to the connection it began on.

use bytes::Bytes;
use rustc_hash::{FxHashMap, FxHashSet};

use super::error::CallbackError;
use crate::cache::Cache;
use crate::ids::{Oid, Tid};
use crate::wire::TxnKey;

pub type FinishCallback = Box<dyn FnOnce(Tid) -> Result<(), CallbackError> + Send>;

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
            refused: false,
        }
    }

    /// The last store of an object counts.
    pub(super) fn stored(&mut self, oid: Oid, data: &Bytes) {
        let fits = self.kept + data.len() <= self.keep_at_most;
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
        Finish {
            stores: std::mem::take(&mut self.stores),
            resolved: std::mem::take(&mut self.resolved),
            callback,
        }
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
