//! `/metrics`: the counters of every storage, in the OpenMetrics text format that Prometheus reads.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::histogram::{Histogram, Sizes};
use crate::server::Shared;
use crate::server::hub::Hub;

/// Content type of [`render`].
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The whole answer. Costs a walk over the counters; nothing is locked but the lists that are counted.
pub(super) fn render(shared: &Arc<Shared>) -> Result<String, Error> {
    let mut registry = Registry::with_prefix("zeo");
    registry.register_collector(Box::new(Storages(Arc::clone(shared))));
    let mut page = String::new();
    text::encode(&mut page, &registry)?;
    Ok(page)
}

struct Storages(Arc<Shared>);

impl std::fmt::Debug for Storages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Storages")
    }
}

type Labels = [(&'static str, String); 1];

impl Collector for Storages {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut families = Families { encoder: &mut encoder, hubs: &self.0.hubs };
        families.counter("loads", "loadBefore calls", |hub| read(&hub.stats.loads))?;
        families.counter("page_cache_hits", "loads answered without waiting for the disk", |hub| {
            read(&hub.stats.loads).saturating_sub(read(&hub.stats.disk_loads))
        })?;
        families.counter(
            "disk_loads",
            "loads that were not in the page cache, or of a storage in Python",
            |hub| read(&hub.stats.disk_loads),
        )?;
        families.counter(
            "shared_cache_stores",
            "objects put where clients of this machine find them",
            |hub| hub.shelf.as_ref().map_or(0, |shelf| shelf.puts()),
        )?;
        families.counter("stores", "records received for transactions", |hub| read(&hub.stats.stores))?;
        families.counter("commits", "finished transactions", |hub| read(&hub.stats.commits))?;
        families.counter("commit_groups", "groups of transactions that shared a sync", |hub| {
            read(&hub.stats.groups)
        })?;
        families.counter(
            "aborts",
            "transactions that were aborted, or ended with their connection",
            |hub| read(&hub.stats.aborts),
        )?;
        families.counter(
            "transaction_timeouts",
            "transactions that held their locks for too long",
            |hub| read(&hub.stats.timeouts),
        )?;
        families
            .counter("conflicts", "votes that failed with a conflict", |hub| read(&hub.stats.conflicts))?;
        families.counter("conflicts_resolved", "objects whose conflict was resolved", |hub| {
            read(&hub.stats.conflicts_resolved)
        })?;
        families.counter(
            "slow_operations",
            "operations above the threshold of the slow-operation log",
            |hub| read(&hub.stats.slow),
        )?;
        families.counter("received_bytes", "received from registered clients", |hub| {
            read(&hub.stats.bytes_received)
        })?;
        families.counter("sent_bytes", "sent to registered clients", |hub| read(&hub.stats.bytes_sent))?;
        families.counter("blob_received_bytes", "of blobs, from clients", |hub| {
            read(&hub.stats.blob_bytes_received)
        })?;
        families
            .counter("blob_sent_bytes", "of blobs, to clients", |hub| read(&hub.stats.blob_bytes_sent))?;
        families.gauge("blob_uploads", "blobs being received", |hub| read(&hub.stats.uploads) as f64)?;
        families.gauge("blob_downloads", "blobs being sent", |hub| read(&hub.stats.downloads) as f64)?;
        families.gauge("connections", "registered clients", |hub| hub.connections() as f64)?;
        families
            .gauge("active_transactions", "begun and not ended", |hub| read(&hub.stats.active_txns) as f64)?;
        families.gauge("waiting_votes", "votes that wait for locks", |hub| hub.locks.waiting() as f64)?;
        families.gauge("longest_lock_age_seconds", "age of the oldest lock", |hub| {
            hub.locks.held_since().map_or(0.0, |since| since.elapsed().as_secs_f64())
        })?;
        families.gauge("objects", "objects in the storage", |hub| hub.known_info().length as f64)?;
        families.gauge("size_bytes", "size of the storage", |hub| hub.known_info().size as f64)?;
        families.gauge("last_transaction_time_seconds", "Unix time of the last transaction", |hub| {
            hub.registry().last_tid().to_unix()
        })?;
        families.gauge(
            "invalidation_queue_transactions",
            "transactions kept for clients that were away",
            |hub| hub.registry().queue_len() as f64,
        )?;
        families.gauge(
            "unread_invalidation_bytes",
            "invalidations that wait for all clients together",
            |hub| hub.unread().0 as f64,
        )?;
        families.gauge(
            "unread_invalidation_bytes_max",
            "invalidations that wait for the slowest client; it is dropped at max-unread-invalidations",
            |hub| hub.unread().1 as f64,
        )?;
        families
            .gauge("pack_running", "1 while a pack runs", |hub| f64::from(u8::from(hub.pack.is_running())))?;
        families.gauge("pack_bytes_done", "bytes of the present phase of a pack", |hub| {
            hub.pack.progress().map_or(0.0, |progress| progress.bytes_done as f64)
        })?;
        families.gauge("pack_bytes_total", "bytes of the present phase, when it is done", |hub| {
            hub.pack.progress().map_or(0.0, |progress| progress.bytes_total as f64)
        })?;
        families.gauge("pack_objects_done", "objects of the present phase of a pack", |hub| {
            hub.pack.progress().map_or(0.0, |progress| progress.objects_done as f64)
        })?;
        families.gauge("pack_objects_total", "objects of the present phase, when it is done", |hub| {
            hub.pack.progress().map_or(0.0, |progress| progress.objects_total as f64)
        })?;
        families.histogram("load", "loadBefore, from the request read to the reply written", |hub| {
            &hub.stats.load_seconds
        })?;
        families.histogram("lock_wait", "from a vote to its locks", |hub| &hub.stats.lock_wait_seconds)?;
        families.histogram("finish", "append, sync and publication of a group of transactions", |hub| {
            &hub.stats.finish_seconds
        })?;
        families
            .histogram("sync", "what of a finish was waiting for the disk", |hub| &hub.stats.sync_seconds)?;
        families.sizes("commit_group_size", "transactions that shared a sync", |hub| &hub.stats.group_size)
    }
}

/// One family of metrics is one line a storage.
struct Families<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
    hubs: &'a [Arc<Hub>],
}

impl Families<'_, '_> {
    fn counter(&mut self, name: &str, help: &str, value: impl Fn(&Arc<Hub>) -> u64) -> Result<(), Error> {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for hub in self.hubs {
            ConstCounter::new(value(hub)).encode(family.encode_family(&labels(hub))?)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Fn(&Arc<Hub>) -> f64) -> Result<(), Error> {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for hub in self.hubs {
            ConstGauge::new(value(hub)).encode(family.encode_family(&labels(hub))?)?;
        }
        Ok(())
    }

    fn sizes(&mut self, name: &str, help: &str, of: impl Fn(&Arc<Hub>) -> &Sizes) -> Result<(), Error> {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for hub in self.hubs {
            let sizes = of(hub);
            let buckets = sizes.buckets();
            let count = buckets.iter().map(|(_, count)| count).sum();
            family.encode_family(&labels(hub))?.encode_histogram::<Labels>(
                sizes.sum() as f64,
                count,
                &buckets,
                None,
            )?;
        }
        Ok(())
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        of: impl Fn(&Arc<Hub>) -> &Histogram,
    ) -> Result<(), Error> {
        let mut family =
            self.encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for hub in self.hubs {
            let histogram = of(hub);
            family.encode_family(&labels(hub))?.encode_histogram::<Labels>(
                histogram.sum_seconds(),
                histogram.count(),
                &histogram.buckets(),
                None,
            )?;
        }
        Ok(())
    }
}

fn labels(hub: &Hub) -> Labels {
    [("storage", hub.id.clone())]
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
