//! What becomes of a vote: bounds that are checked before it, the engine's verdict, and what can be told while it waits.

use std::sync::Arc;

use bytes::Bytes;

use super::commit::Held;
use super::hub::Hub;
use super::locks::LockGuard;
use crate::ids::{Oid, Tid};
use crate::pickle::Value;
use crate::storage::{
    Conflict, ConflictResolver, Op, Resolution, StagedTxn, Storage, StorageError, VoteOutcome,
};

/// Larger oids are not stored.
const MAX_OID: u64 = i64::MAX as u64;

/// What is wrong with an oid or a tid of a transaction. ZODB's tools take both for signed numbers, and after the largest one
/// no other could be given.
pub(super) fn beyond_bounds(staged: &StagedTxn) -> Option<String> {
    if let Some(tid) = staged.tid.filter(|tid| *tid >= Tid::MAX) {
        return Some(format!("the transaction's tid {tid} is larger than any that a storage can have"));
    }
    let oid = staged.ops.iter().filter_map(Op::oid).find(|oid| oid.0 >= MAX_OID)?;
    Some(format!("the oid {oid} is larger than any that a storage can give"))
}

/// How a vote ended. Of the two that keep locks, `Ready` does so until finish or abort.
pub(super) enum Verdict {
    Ready(Held, Vec<Oid>),
    Conflicts(Vec<Conflict>),
    Failed(StorageError, LockGuard),
}

pub(super) fn judge(
    hub: &Arc<Hub>,
    staged: StagedTxn,
    resolver: &dyn ConflictResolver,
    locks: LockGuard,
) -> Verdict {
    match hub.storage.vote(staged, resolver) {
        Ok(VoteOutcome::Ready(mut voted)) => {
            let resolved = std::mem::take(&mut voted.resolved);
            Verdict::Ready(Held::new(Arc::clone(hub), locks, voted), resolved)
        }
        Ok(VoteOutcome::Conflicts(conflicts)) => Verdict::Conflicts(conflicts),
        Err(error) => Verdict::Failed(error, locks),
    }
}

/// The conflict in which the vote of `staged` will end, whoever commits before: what it is based on was replaced by a
/// transaction that is published, so that the answer, written after its invalidation, tells the client nothing new.
///
/// Cost: an index lookup and a `pread` for each operation.
pub(super) fn lost(hub: &Hub, staged: &StagedTxn) -> Option<StorageError> {
    let published = hub.registry().last_tid();
    let replaced = |oid, read| {
        let committed = hub.storage.current_tid(oid).ok()?;
        (committed != read && committed <= published).then_some(committed)
    };
    staged.ops.iter().find_map(|op| match op {
        Op::Store { oid, serial, data, .. } => {
            let committed = replaced(*oid, *serial)?;
            let data = data.to_bytes().ok()?;
            if hub.options.resolver.may_resolve(&data) {
                return None;
            }
            Some(StorageError::Conflict(Box::new(Conflict { oid: *oid, committed, read: *serial, data })))
        }
        Op::CheckCurrent { oid, serial } => {
            let committed = replaced(*oid, *serial)?;
            Some(StorageError::ReadConflict { oid: *oid, committed, read: *serial })
        }
        _ => None,
    })
}

pub(super) fn for_client(conflict: &Conflict) -> Value {
    Value::dict([
        ("oid", conflict.oid.into()),
        ("serials", Value::Tuple(vec![conflict.committed.into(), conflict.read.into()])),
        ("data", conflict.data.clone().into()),
    ])
}

/// Client-side conflict resolution: every conflict is sent back.
pub(super) struct AskClient;

impl ConflictResolver for AskClient {
    fn resolve(&self, _: &dyn Storage, _: &Conflict, _: Option<Bytes>) -> Resolution {
        Resolution::AskClient
    }
}
