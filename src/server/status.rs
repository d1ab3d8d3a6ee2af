//! The status of a storage: `server_status` and the JSON of `ruok`, with ZEO's keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::hub::Hub;
use crate::pickle::Value;
use crate::storage::PackProgress;

/// The keys that monitoring of ZEO reads, in its order; then ours.
pub(crate) fn value(hub: &Arc<Hub>) -> Value {
    let stats = &hub.stats;
    let number = |counter: &AtomicU64| Value::from(counter.load(Ordering::Relaxed));
    let has_timeout = hub.options.transaction_timeout.is_some();
    let holders = hub.locks.holders().into_iter().map(|holder| {
        Value::dict([
            ("client", holder.who.into()),
            ("waiting", holder.waiting.into()),
            ("objects", holder.objects.map(|objects| objects as u64).into()),
            ("seconds", holder.since.elapsed().as_secs_f64().into()),
        ])
    });
    let lock_time = hub.locks.held_since().map(|since| unix_now() - since.elapsed().as_secs_f64());
    Value::dict([
        ("connections", (hub.connections() as u64).into()),
        ("loads", number(&stats.loads)),
        ("stores", number(&stats.stores)),
        ("commits", number(&stats.commits)),
        ("aborts", number(&stats.aborts)),
        ("conflicts", number(&stats.conflicts)),
        ("conflicts_resolved", number(&stats.conflicts_resolved)),
        ("active_txns", number(&stats.active_txns)),
        ("lock_time", lock_time.into()),
        ("waiting", (hub.locks.waiting() as u64).into()),
        ("start", ctime(hub.started).into()),
        ("timeout-thread-is-alive", if has_timeout { true.into() } else { "stub".into() }),
        ("last-transaction", format!("{:016x}", hub.registry().last_tid().0).into()),
        ("transaction_timeouts", number(&stats.timeouts)),
        ("commit_groups", number(&stats.groups)),
        ("blob_uploads", number(&stats.uploads)),
        ("blob_downloads", number(&stats.downloads)),
        ("blob_bytes_received", number(&stats.blob_bytes_received)),
        ("blob_bytes_sent", number(&stats.blob_bytes_sent)),
        ("pack", hub.pack.progress().map_or(Value::None, pack)),
        ("locks", Value::List(holders.collect())),
    ])
}

fn pack(progress: PackProgress) -> Value {
    Value::dict([
        ("phase", progress.phase.into()),
        ("bytes_done", progress.bytes_done.into()),
        ("bytes_total", progress.bytes_total.into()),
        ("objects_done", progress.objects_done.into()),
        ("objects_total", progress.objects_total.into()),
    ])
}

/// `{storage id: status}` as one line of JSON.
pub(crate) fn json(hubs: &[Arc<Hub>]) -> String {
    let storages = hubs.iter().map(|hub| (hub.id.clone(), to_json(&value(hub)))).collect();
    serde_json::Value::Object(storages).to_string()
}

pub(super) fn to_json(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(flag) => (*flag).into(),
        Value::Int(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Str(text) => text.as_str().into(),
        Value::List(items) | Value::Tuple(items) => items.iter().map(to_json).collect(),
        Value::Dict(pairs) => serde_json::Value::Object(
            pairs
                .iter()
                .map(|(key, value)| (key.as_str().unwrap_or_default().to_owned(), to_json(value)))
                .collect(),
        ),
        _ => serde_json::Value::Null,
    }
}

fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64())
}

/// C's `ctime`, in UTC: `Sun Nov 22 15:46:52 2026`.
fn ctime(time: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, in_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = crate::ids::civil_from_days(days as i64);
    format!(
        "{} {} {day:2} {:02}:{:02}:{:02} {year}",
        DAYS[(days % 7) as usize],
        MONTHS[(month.clamp(1, 12) - 1) as usize],
        in_day / 3600,
        in_day / 60 % 60,
        in_day % 60,
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ctime_is_that_of_c() {
        assert_eq!(ctime(UNIX_EPOCH), "Thu Jan  1 00:00:00 1970");
        assert_eq!(ctime(UNIX_EPOCH + Duration::from_secs(1_795_362_412)), "Sun Nov 22 15:46:52 2026");
    }
}
