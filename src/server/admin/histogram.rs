//! [`Histogram`]: counts of durations by powers of two, without locks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds are 2^10 ns (1 µs) to 2^34 ns (17 s), then infinity.
const FIRST_BIT: u32 = 10;
const BUCKETS: usize = 26;

/// Cost of a record: two relaxed atomic additions.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    nanoseconds: AtomicU64,
}

impl Histogram {
    pub(crate) fn record(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        // The smallest bound 2^b >= n has b = number of bits of n - 1.
        let bits = u64::BITS - nanoseconds.saturating_sub(1).leading_zeros();
        let bucket = (bits.saturating_sub(FIRST_BIT) as usize).min(BUCKETS - 1);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// `(upper bound in seconds, count in this bucket)`, the last bound infinite.
    pub(crate) fn buckets(&self) -> Vec<(f64, u64)> {
        let bound = |at: usize| match at {
            at if at == BUCKETS - 1 => f64::INFINITY,
            at => (1u64 << (FIRST_BIT as usize + at)) as f64 / 1e9,
        };
        self.buckets
            .iter()
            .enumerate()
            .map(|(at, count)| (bound(at), count.load(Ordering::Relaxed)))
            .collect()
    }

    pub(crate) fn sum_seconds(&self) -> f64 {
        self.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9
    }

    pub(crate) fn count(&self) -> u64 {
        self.buckets.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// The bound (in seconds) that `share` of the records do not exceed; 0 without records.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let wanted = (self.count() as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bound, count) in self.buckets() {
            seen += count;
            if count > 0 && seen >= wanted {
                return bound.min(60.0);
            }
        }
        0.0
    }
}

/// Counts of small numbers (transactions of a group) by powers of two: up to 1, 2, 4 … 512, more.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    buckets: [AtomicU64; SIZES],
    sum: AtomicU64,
}

const SIZES: usize = 11;

impl Sizes {
    pub(crate) fn record(&self, size: usize) {
        let bits = usize::BITS - size.saturating_sub(1).leading_zeros();
        if let Some(bucket) = self.buckets.get((bits as usize).min(SIZES - 1)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(size as u64, Ordering::Relaxed);
    }

    /// As [`Histogram::buckets`].
    pub(crate) fn buckets(&self) -> Vec<(f64, u64)> {
        let bound = |at: usize| if at == SIZES - 1 { f64::INFINITY } else { (1u64 << at) as f64 };
        let counts = self.buckets.iter().map(|count| count.load(Ordering::Relaxed));
        counts.enumerate().map(|(at, count)| (bound(at), count)).collect()
    }

    pub(crate) fn sum(&self) -> u64 {
        self.sum.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_counted_below_its_bound() {
        let histogram = Histogram::default();
        for nanoseconds in [0, 1, 1024, 1025, 2048, 1_000_000, u64::MAX] {
            histogram.record(Duration::from_nanos(nanoseconds));
        }
        let buckets = histogram.buckets();
        assert_eq!(buckets[0], (1.024e-6, 3));
        assert_eq!(buckets[1], (2.048e-6, 2));
        assert_eq!(buckets[10], (1_048_576e-9, 1));
        assert_eq!(buckets[BUCKETS - 1], (f64::INFINITY, 1));
        assert_eq!(histogram.count(), 7);
    }

    #[test]
    fn sizes_are_counted_below_their_bounds() {
        let sizes = Sizes::default();
        [1, 2, 3, 4, 5, 512, 513, 100_000].into_iter().for_each(|size| sizes.record(size));
        let counts: Vec<u64> = sizes.buckets().into_iter().map(|(_, count)| count).collect();
        assert_eq!(counts, [1, 1, 2, 1, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(sizes.buckets()[9].0, 512.0);
        assert_eq!(sizes.sum(), 101_040);
    }

    #[test]
    fn quantiles_are_bounds() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), 0.0);
        for _ in 0..99 {
            histogram.record(Duration::from_micros(1));
        }
        histogram.record(Duration::from_secs(1));
        assert_eq!(histogram.quantile(0.5), 1.024e-6);
        assert!((1.0..1.1).contains(&histogram.quantile(1.0)));
    }
}
