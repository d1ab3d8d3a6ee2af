//! Verification: what a server says of the cache, before anybody is answered from it.

use std::time::Instant;

use rustc_hash::FxHashSet;

use super::Client;
use super::core::in_callback;
use super::dial::{DialError, Registered, tid_of};
use crate::ids::{Oid, Tid};
use crate::pickle::Value;
use crate::wire::Call;

/// So many of a cache's newest revisions are looked for on the server: some may have been packed, unreferenced.
const CANDIDATES: usize = 16;

/// Whether the server has a revision of the cache.
enum Known {
    Same,
    Missing,
    /// Of the same tid, with other data.
    Other,
}

/// What changed since the cache was last up to date. Afterwards the cache is right as of the returned tid.
pub(super) fn verify(
    client: &Client,
    registered: &mut Registered,
    deadline: Instant,
) -> Result<(Tid, Vec<Oid>), DialError> {
    let core = &client.core;
    if !client.was_ready() {
        if core.cache.is_empty() {
            // There is nothing that its tid could be about.
            core.forget_last_tid();
        } else {
            check_file(client, registered, deadline)?;
        }
    }
    let (cached, server) = (core.last_tid_now(), registered.server_tid);
    if cached > server {
        return Err(DialError::Cache(format!(
            "the server's last transaction {server} is older than {cached}, which this client has seen: \
             a restored backup, a lagging replica or another database; restart the client to accept it"
        )));
    }
    if core.cache.is_empty() || cached == server {
        return Ok((server, Vec::new()));
    }
    let answer = registered.call(
        "getInvalidations",
        &Call::GetInvalidations { tid: cached },
        deadline,
        &client.closing,
    )?;
    if let Some((tid, oids)) = invalidations_of(&answer) {
        for &oid in &oids {
            core.cache.invalidate(oid, None);
        }
        tracing::info!(%cached, %tid, objects = oids.len(), "cache verified");
        return Ok((tid, oids));
    }
    if answer != Value::None {
        return Err(DialError::Unexpected("getInvalidations"));
    }
    in_callback(|| core.callbacks.stale_cache());
    tracing::error!(name = client.options.name, %cached, %server, "too much was missed: dropping stale cache");
    core.cache.clear();
    Ok((server, Vec::new()))
}

/// A cache file may be of another database, or of one that was set back since: by a restored backup, a lagging replica.
/// Then it is moved aside. Only before anybody was told of its last tid; later that would be going back.
///
/// What shows that it is not: the server has the newest revision of the cache. That one may be missing for another
/// reason as well: it was changed while the client was away, and packed. Then the newest one of the objects that
/// have not changed is looked for, and what the cache knows to have happened after it is forgotten.
fn check_file(client: &Client, registered: &mut Registered, deadline: Instant) -> Result<(), DialError> {
    let core = &client.core;
    let cached = core.last_tid_now();
    if cached > registered.server_tid {
        move_aside(client, "the server's last transaction is older than the cache's", registered);
        return Ok(());
    }
    let unknown = "the server does not know the cache's newest revisions";
    let mut changed = FxHashSet::default();
    let Some(&newest) = core.cache.newest(1, &changed).first() else { return Ok(()) };
    match ask_for(client, newest, registered, deadline)? {
        Known::Same => return Ok(()),
        Known::Missing => {}
        Known::Other => {
            move_aside(client, "the server has another revision than the cache", registered);
            return Ok(());
        }
    }
    let call = Call::GetInvalidations { tid: cached };
    let answer = registered.call("getInvalidations", &call, deadline, &client.closing)?;
    let Some((_, oids)) = invalidations_of(&answer) else {
        move_aside(client, unknown, registered);
        return Ok(());
    };
    changed.extend(oids);
    let candidates = core.cache.newest(CANDIDATES, &changed);
    if candidates.is_empty() {
        // All of it would be invalidated now: nothing is left that could be of another database.
        tracing::info!(name = client.options.name, "everything in the cache has changed");
        core.cache.clear();
        core.forget_last_tid();
        return Ok(());
    }
    for candidate in candidates {
        match ask_for(client, candidate, registered, deadline)? {
            Known::Same => {
                core.cache.forget_after(candidate.1);
                return Ok(());
            }
            Known::Missing => {}
            Known::Other => break,
        }
    }
    move_aside(client, unknown, registered);
    Ok(())
}

fn ask_for(
    client: &Client,
    (oid, serial): (Oid, Tid),
    registered: &mut Registered,
    deadline: Instant,
) -> Result<Known, DialError> {
    let call = Call::LoadSerial { oid, serial };
    match registered.call("loadSerial", &call, deadline, &client.closing) {
        Ok(Value::Bytes(data)) => {
            let cached = client.core.cache.load_before(oid, serial.next());
            Ok(if cached.is_none_or(|cached| cached.data == data) { Known::Same } else { Known::Other })
        }
        Ok(_) => Err(DialError::Unexpected("loadSerial")),
        // Set back and gone on since: then it is not there, or it is another one.
        Err(DialError::Fault { .. }) => Ok(Known::Missing),
        Err(error) => Err(error),
    }
}

fn move_aside(client: &Client, problem: &'static str, registered: &Registered) {
    let core = &client.core;
    tracing::warn!(
        name = client.options.name,
        cache = %core.last_tid_now(),
        server = %registered.server_tid,
        "{problem} (a restored backup, a lagging replica, another database): starting with an empty cache"
    );
    core.cache.move_aside();
    core.forget_last_tid();
}

/// `(tid, [oid, ...])`.
fn invalidations_of(answer: &Value) -> Option<(Tid, Vec<Oid>)> {
    let (Value::Tuple(items) | Value::List(items)) = answer else { return None };
    let [tid, Value::Tuple(oids) | Value::List(oids)] = items.as_slice() else { return None };
    let oids = oids
        .iter()
        .map(|oid| match oid {
            Value::Bytes(bytes) => Oid::from_slice(bytes),
            _ => None,
        })
        .collect::<Option<Vec<_>>>()?;
    Some((tid_of(tid)?, oids))
}
