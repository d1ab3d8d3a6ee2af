//! Calls that read: loads, history, invalidations missed, iteration by oid; and `new_oids`, `pack`.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::fault;
use super::hub::{Hub, count};
use super::session::{Outcome, ReplyTo, Served, Session};
use super::undo::with_extension;
use crate::ids::{Oid, Tid};
use crate::limits::MAX_NEW_OIDS;
use crate::pickle::Value;
use crate::storage::{HistoryEntry, Loaded, NextRecord, PackOptions, Result, Storage, StorageError};
use crate::wire::{Fault, encode_loaded};

/// Entries that `history` may be asked for at once.
const MAX_HISTORY: i64 = 1 << 20;

impl Session {
    /// Cost, for a record in the page cache: the engine's index lookup and read, one copy into the output buffer. With clients that
    /// share a cache: its mutex, and two `pwrite` if the object is not there.
    pub(crate) fn load_before(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, oid: Oid, before: Tid) -> Served {
        let began = Instant::now();
        count(&hub.stats.loads);
        let view = self.view;
        let as_of_view = before.min(view.next());
        let ticket = hub.shelf.as_ref().and_then(|shelf| shelf.ticket(oid));
        let loaded = if hub.capabilities.slow_calls {
            Err(StorageError::WouldBlock)
        } else {
            hub.storage.try_load_before(oid, as_of_view)
        };
        if !matches!(loaded, Err(StorageError::WouldBlock)) {
            hub.shelve(ticket, oid, &loaded);
            let served = self.loaded(to, view, loaded);
            let took = began.elapsed();
            hub.stats.load_seconds.record(took);
            self.took(to, took);
            return served;
        }
        count(&hub.stats.disk_loads);
        let mut to = to.take();
        let (worker_hub, hub) = (Arc::clone(hub), Arc::clone(hub));
        self.slow_loads.push(view);
        self.background(
            move || {
                let loaded = worker_hub.storage.load_before(oid, as_of_view);
                worker_hub.shelve(ticket, oid, &loaded);
                loaded
            },
            move |session, loaded| {
                let served = session.loaded_slowly(&mut to, oid, view, loaded);
                session.slow_load_done(view);
                let took = began.elapsed();
                hub.stats.load_seconds.record(took);
                match served {
                    Ok(Outcome::Later) => session.took(&to, took),
                    served => session.answer(to, served),
                }
            },
        );
        Ok(Outcome::Later)
    }

    /// The answer to a load as of `view`.
    fn loaded(&mut self, to: &ReplyTo, view: Tid, loaded: Result<Option<Loaded>>) -> Served {
        match loaded {
            Ok(Some(Loaded { data, tid, end_tid })) => {
                let loaded = Some((&data[..], tid, end_tid.filter(|end| *end <= view)));
                if to.is_async {
                    return Ok(Outcome::Reply(Value::None));
                }
                encode_loaded(self.encoding, &to.id, loaded, &mut self.out)
                    .map_err(|error| Fault::value_error(error.to_string()))?;
                Ok(Outcome::Later)
            }
            Ok(None) => Ok(Outcome::Reply(Value::None)),
            Err(error) => Err(fault::of(&error)),
        }
    }

    /// As [`Self::loaded`], but `view` has moved on: what was current then may have ended since.
    fn loaded_slowly(
        &mut self,
        to: &mut ReplyTo,
        oid: Oid,
        view: Tid,
        loaded: Result<Option<Loaded>>,
    ) -> Served {
        let Ok(Some(loaded)) = loaded else { return self.loaded(to, view, loaded) };
        let known = loaded.end_tid.filter(|end| *end <= view);
        let ended =
            || self.published_meanwhile.iter().find(|later| later.tid > view && later.oids.contains(&oid));
        let end_tid = known.or_else(|| Some(ended()?.tid));
        self.loaded(to, self.view, Ok(Some(Loaded { end_tid, ..loaded })))
    }

    pub(crate) fn load_serial(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, oid: Oid, serial: Tid) -> Served {
        if serial > self.view {
            return Err(fault::of(&StorageError::NotFound(oid)));
        }
        let storage = Arc::clone(&hub.storage);
        self.in_background(to, move || storage.load_serial(oid, serial).map(Value::from))
    }

    pub(crate) fn get_tid(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, oid: Oid) -> Served {
        let storage = Arc::clone(&hub.storage);
        let before = self.view.next();
        self.in_background(to, move || {
            let loaded = storage.load_before(oid, before)?;
            loaded.map(|loaded| loaded.tid.into()).ok_or(StorageError::NotFound(oid))
        })
    }

    pub(crate) fn history(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, oid: Oid, size: i64) -> Served {
        let storage = Arc::clone(&hub.storage);
        let size = size.clamp(0, MAX_HISTORY) as usize;
        let view = self.view;
        self.in_background(to, move || {
            let entries = history_up_to(&*storage, oid, size, view)?.into_iter().map(|entry| {
                let fixed = [
                    ("time", entry.tid.to_unix().into()),
                    ("user_name", entry.meta.user.into()),
                    ("description", entry.meta.description.into()),
                    ("tid", entry.tid.into()),
                    ("size", entry.size.into()),
                ];
                with_extension(fixed, &entry.meta.extension, false)
            });
            Ok(Value::List(entries.collect()))
        })
    }

    pub(crate) fn record_iternext(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, next: Option<Oid>) -> Served {
        if !hub.capabilities.record_iternext {
            return Err(fault::of(&StorageError::Unsupported("record_iternext")));
        }
        let storage = Arc::clone(&hub.storage);
        let view = self.view;
        self.in_background(to, move || match record_as_of(&*storage, next, view)? {
            Some(record) => Ok(Value::Tuple(vec![
                record.oid.into(),
                record.tid.into(),
                record.data.into(),
                record.next.into(),
            ])),
            None => Err(StorageError::NotFound(next.unwrap_or(Oid::ROOT))),
        })
    }

    pub(crate) fn get_info(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo) -> Served {
        let storage = Arc::clone(&hub.storage);
        let capabilities = hub.capabilities.clone();
        let offers = [self.offer_local_socket(), self.offer_shelf(hub)];
        self.here_or_in_background(hub, to, move || {
            let interfaces = capabilities
                .interfaces
                .iter()
                .map(|(module, name)| Value::Tuple(vec![module.as_str().into(), name.as_str().into()]));
            let info = [
                ("length", storage.object_count().into()),
                ("size", storage.size().into()),
                ("name", storage.name().into()),
                ("supportsUndo", capabilities.undo.into()),
                ("supports_record_iternext", capabilities.record_iternext.into()),
                ("interfaces", Value::Tuple(interfaces.collect())),
            ];
            let info = info.into_iter().map(|(key, value)| (key.into(), value));
            Ok(Value::Dict(info.chain(offers.into_iter().flatten()).collect()))
        })
    }

    pub(crate) fn new_oids(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, count: i64) -> Served {
        self.may_write()?;
        let storage = Arc::clone(&hub.storage);
        let count = count.clamp(1, MAX_NEW_OIDS as i64) as usize;
        self.in_background(to, move || Ok(Value::oids(&storage.new_oids(count)?)))
    }

    /// What changed after `since`: from the queue, or within `invalidation-age` from the storage; else `None`.
    ///
    /// Never beyond the view: the client takes the tid of the answer as its own and skips invalidations up to it.
    pub(crate) fn get_invalidations(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, since: Tid) -> Served {
        let view = self.view;
        if let Some(oids) = hub.registry().invalidations(since, view) {
            return Ok(Outcome::Reply(Value::Tuple(vec![view.into(), Value::oids(&oids)])));
        }
        let Some(age) = hub.options.invalidation_age else { return Ok(Outcome::Reply(Value::None)) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
        if now - since.to_unix() >= age.as_secs_f64() || since >= view {
            return Ok(Outcome::Reply(Value::None));
        }
        let storage = Arc::clone(&hub.storage);
        self.in_background(to, move || changed_between(&*storage, since, view))
    }

    /// Packs on a worker thread. Everybody is told the new size; whoever waits gets the reply after that.
    pub(crate) fn pack(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, time: f64, wait: bool) -> Served {
        if Tid::from_unix(time).is_none() {
            // Now, so that who does not wait is told, too.
            return Err(fault::of(&StorageError::PackTime(time)));
        }
        let waits = wait && !to.is_async;
        let worker_hub = Arc::clone(hub);
        let server = Arc::clone(&self.server);
        let holder: Arc<str> = format!("pack, asked by {}", self.who()).into();
        if let Some(not_logged) = self.chatter.spend(Instant::now()) {
            tracing::info!(client = %self.who(), storage = %hub.id, time, not_logged, "pack started");
        }
        let work = move || {
            let hub = worker_hub;
            let switch_lock = super::locks::WholeStorage {
                locks: Arc::clone(&hub.locks),
                holder,
                patience: hub.options.transaction_timeout,
            };
            // A second pack is refused by the engine, and has no progress to show.
            let run = hub.pack.begin();
            let options = PackOptions {
                time,
                gc: None,
                references: &*hub.options.references,
                progress: &mut |progress| {
                    if let Some(run) = &run {
                        run.set(progress);
                    }
                    !server.is_stopping()
                },
                throttle: None,
            };
            let packed = hub.storage.pack(options, &switch_lock);
            drop(run);
            match &packed {
                Ok(()) => {
                    tracing::info!(storage = %hub.id, "pack finished");
                    hub.broadcast_info();
                }
                Err(StorageError::Cancelled) => {
                    tracing::info!(storage = %hub.id, "pack given up, because the server stops: the storage is as it was");
                }
                Err(error) => {
                    if let Some(not_logged) = server.refused_packs.spend(Instant::now()) {
                        tracing::error!(storage = %hub.id, %error, not_logged, "pack failed");
                    }
                }
            }
            packed.map(|()| Value::None)
        };
        if waits {
            return self.in_background(to, work);
        }
        self.background(work, |_, _| {});
        Ok(Outcome::Reply(Value::None))
    }
}

/// The newest `size` revisions that are not younger than `view`.
///
/// Younger ones are those whose publication is under way, so this asks once, or, if some are on top, once more.
fn history_up_to(storage: &dyn Storage, oid: Oid, size: usize, view: Tid) -> Result<Vec<HistoryEntry>> {
    let mut asked = size;
    loop {
        let mut entries = storage.history(oid, asked)?;
        let found = entries.len();
        entries.retain(|entry| entry.tid <= view);
        if entries.len() >= size || found < asked {
            entries.truncate(size);
            // Created after the view.
            return if entries.is_empty() && found > 0 {
                Err(StorageError::NotFound(oid))
            } else {
                Ok(entries)
            };
        }
        asked = size + (found - entries.len());
    }
}

/// `record_iternext` as of `view`: objects that are younger are passed over.
fn record_as_of(storage: &dyn Storage, next: Option<Oid>, view: Tid) -> Result<Option<NextRecord>> {
    let mut from = next;
    loop {
        let Some(record) = storage.record_iternext(from)? else { return Ok(None) };
        if record.tid <= view {
            return Ok(Some(record));
        }
        match storage.load_before(record.oid, view.next()) {
            Ok(Some(Loaded { data, tid, .. })) => return Ok(Some(NextRecord { data, tid, ..record })),
            Ok(None) | Err(StorageError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        let Some(following) = record.next else { return Ok(None) };
        from = Some(following);
    }
}

fn changed_between(storage: &dyn Storage, since: Tid, view: Tid) -> Result<Value> {
    let mut transactions = storage.iterate(Some(since.next()), Some(view))?;
    let mut changed = rustc_hash::FxHashSet::default();
    let mut oids = Vec::new();
    let mut last = None;
    while let Some((info, mut records)) = transactions.next_txn()? {
        last = Some(info.tid);
        while let Some(record) = records.next_record()? {
            if changed.insert(record.oid) {
                oids.push(record.oid);
            }
        }
    }
    Ok(last.map_or(Value::None, |tid| Value::Tuple(vec![tid.into(), Value::oids(&oids)])))
}
