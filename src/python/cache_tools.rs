//! `_zeo.trace_stats`, `_zeo.simulate_cache`: what `zeo-rs cache-stats` and `cache-simul` say of traces.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustc_hash::FxHashSet;

use crate::cache::{Policy, Simulated, TraceReader, TraceRecord, simulate};

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(trace_stats, m)?)?;
    m.add_function(wrap_pyfunction!(simulate_cache, m)?)?;
    Ok(())
}

/// What is counted of a stretch of a trace.
#[derive(Default)]
struct Interval {
    start: u32,
    end: u32,
    loads: u64,
    hits: u64,
    invalidations: u64,
    writes: u64,
}

impl Interval {
    fn count(&mut self, record: &TraceRecord) {
        self.end = record.second;
        match record.code & 0x70 {
            0x20 => {
                self.loads += 1;
                self.hits += u64::from(matches!(record.code, 0x22 | 0x26));
            }
            0x50 => self.writes += 1,
            0x10 if record.code != 0x10 => self.invalidations += 1,
            _ => {}
        }
    }
}

/// Counts of a trace in ZEO's format: `records`, `first` and `last` second, `objects` loaded, `codes` (code: count), `data_records`,
/// `data_bytes`, and `intervals` of so many seconds as `(start, end, loads, hits, invalidations, writes)`. `None`: it is no trace.
#[pyfunction]
fn trace_stats<'py>(py: Python<'py>, trace: &[u8], interval: u32) -> PyResult<Option<Bound<'py, PyDict>>> {
    let (mut records, mut data_records, mut data_bytes) = (0_u64, 0_u64, 0_u64);
    let (mut first, mut last) = (0, 0);
    let (mut codes, mut objects) = (BTreeMap::<u8, u64>::new(), FxHashSet::default());
    let mut intervals: Vec<Interval> = Vec::new();
    let interval = interval.max(1);
    // The magic of ZEO's cache files could be read as a time.
    if trace.starts_with(b"ZEC") {
        return Ok(None);
    }
    for record in TraceReader(trace) {
        if !is_known(record.code) {
            return Ok(None);
        }
        if records == 0 {
            first = record.second;
        }
        last = record.second;
        records += 1;
        *codes.entry(record.code).or_default() += 1;
        data_records += u64::from(record.length > 0);
        data_bytes += u64::from(record.length);
        if record.code & 0x70 == 0x20 {
            objects.insert(record.oid);
        }
        match intervals.last_mut() {
            Some(now) if now.start / interval == record.second / interval => now.count(&record),
            _ => {
                let mut next = Interval { start: record.second, ..Interval::default() };
                next.count(&record);
                intervals.push(next);
            }
        }
    }
    if records == 0 {
        return Ok(None);
    }
    let dict = PyDict::new(py);
    dict.set_item("records", records)?;
    dict.set_item("first", first)?;
    dict.set_item("last", last)?;
    dict.set_item("objects", objects.len())?;
    dict.set_item("codes", codes)?;
    dict.set_item("data_records", data_records)?;
    dict.set_item("data_bytes", data_bytes)?;
    let rows: Vec<_> =
        intervals.iter().map(|i| (i.start, i.end, i.loads, i.hits, i.invalidations, i.writes)).collect();
    dict.set_item("intervals", rows)?;
    Ok(Some(dict))
}

fn is_known(code: u8) -> bool {
    matches!(code, 0 | 0x10 | 0x1a | 0x1c | 0x1e | 0x20 | 0x22 | 0x24 | 0x26 | 0x50 | 0x52 | 0x54)
}

/// What a cache of `size` bytes would have made of a trace: `loads`, `hits`, `stores`, `invalidations`, `hit_rate` (of 100).
/// With `zeo` ZEO's way of forgetting, otherwise this project's own cache.
#[pyfunction]
fn simulate_cache<'py>(
    py: Python<'py>,
    trace: &[u8],
    size: usize,
    zeo: bool,
) -> PyResult<Bound<'py, PyDict>> {
    let policy = if zeo { Policy::Zeo } else { Policy::Ours };
    let seen: Simulated = py.detach(|| simulate(TraceReader(trace), policy, size));
    let dict = PyDict::new(py);
    dict.set_item("loads", seen.loads)?;
    dict.set_item("hits", seen.hits)?;
    dict.set_item("stores", seen.stores)?;
    dict.set_item("invalidations", seen.invalidations)?;
    dict.set_item("hit_rate", seen.hit_rate())?;
    Ok(dict)
}
