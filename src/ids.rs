//! [`Oid`] and [`Tid`]: the two 8-byte identifiers of ZODB.
//!
//! Both are big-endian unsigned integers on the wire and in files; in memory they are `u64`, which compares the same
//! way. A tid is also a time: minutes since 1900 in months of 31 days (4 bytes), then a fraction of a minute (4 bytes).

use std::fmt;

/// Object id. `Oid::ROOT` (zero) is the database root.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Oid(pub u64);

/// Transaction id; as a *serial*, the tid of the transaction that wrote a revision.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tid(pub u64);

macro_rules! eight_bytes {
    ($name:ident) => {
        impl $name {
            /// The 8 bytes of the wire and of Data.fs (big-endian).
            pub const fn to_bytes(self) -> [u8; 8] {
                self.0.to_be_bytes()
            }
            pub const fn from_bytes(bytes: [u8; 8]) -> Self {
                Self(u64::from_be_bytes(bytes))
            }
            /// `None` unless `bytes` has exactly 8 bytes.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                Some(Self::from_bytes(bytes.try_into().ok()?))
            }
        }
        impl fmt::Display for $name {
            /// ZODB's `oid_repr`/`tid_repr`: `0x`, then hex without leading zero bytes, an even number of digits.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let digits = (64 - self.0.leading_zeros() as usize).div_ceil(8).max(1) * 2;
                write!(f, "0x{:0digits$x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:016x})", stringify!($name), self.0)
            }
        }
    };
}
eight_bytes!(Oid);
eight_bytes!(Tid);

impl Oid {
    pub const ROOT: Self = Self(0);
}

impl Tid {
    /// "Empty storage" as a last tid, "object is new" as a serial (ZODB's `z64`).
    pub const ZERO: Self = Self(0);
    /// ZODB's `maxtid`: as `before`, asks for current data.
    pub const MAX: Self = Self(0x7fff_ffff_ffff_ffff);

    /// The smallest tid greater than this one as a plain integer: `before` bound that includes this tid.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// ZODB's `TimeStamp.laterThan`: this tid if it is greater than `other`, else the one just after `other`
    /// (the low 32 bits count up; at their end, the next calendar minute).
    pub fn later_than(self, other: Self) -> Self {
        if self > other {
            return self;
        }
        if other.0 as u32 != u32::MAX {
            return Self(other.0 + 1);
        }
        let (y, mo, d, h, mi) = split_minutes((other.0 >> 32) as u32);
        let (mut y, mut mo, mut d, mut h, mut mi) = (y, mo, d, h, mi + 1);
        if mi == 60 {
            (mi, h) = (0, h + 1);
        }
        if h == 24 {
            (h, d) = (0, d + 1);
        }
        if d > days_in_month(y, mo) {
            (d, mo) = (1, mo + 1);
        }
        if mo > 12 {
            (mo, y) = (1, y + 1);
        }
        Self(u64::from(join_minutes(y, mo, d, h, mi)) << 32)
    }

    /// Tid of a Unix time in seconds, with ZODB's arithmetic (f64, truncated), so equal to `TimeStamp(*gmtime(t)[:5]+(t%60,))`.
    /// `None`: no tid tells that time (before 1900, after 9916, not a number).
    pub fn from_unix(seconds: f64) -> Option<Self> {
        if !(START_OF_1900..LATEST).contains(&seconds) {
            return None;
        }
        let whole = seconds.floor();
        let days = (whole / 86400.0).floor();
        let (y, mo, d) = civil_from_days(days as i64);
        let in_day = (whole - days * 86400.0) as u32;
        let minute = join_minutes(y, mo, d, in_day / 3600, in_day / 60 % 60);
        let fraction = (seconds.rem_euclid(60.0) / SECOND_UNIT) as u32;
        Some(Self(u64::from(minute) << 32 | u64::from(fraction)))
    }

    /// Unix time in seconds.
    pub fn to_unix(self) -> f64 {
        let (y, mo, d, h, mi) = split_minutes((self.0 >> 32) as u32);
        let seconds = f64::from(self.0 as u32) * SECOND_UNIT;
        (days_from_civil(y, mo, d) * 86400 + i64::from(h * 3600 + mi * 60)) as f64 + seconds
    }
}

/// 1900-01-01 and 9916-01-01 as Unix times. After the latter the minutes no longer fit 32 bits.
const START_OF_1900: f64 = -2_208_988_800.0;
const LATEST: f64 = 250_751_462_400.0;

/// One unit of a tid's low word, in seconds.
const SECOND_UNIT: f64 = 60.0 / 65536.0 / 65536.0;

fn split_minutes(a: u32) -> (u32, u32, u32, u32, u32) {
    let (mi, a) = (a % 60, a / 60);
    let (h, a) = (a % 24, a / 24);
    let (d, a) = (a % 31 + 1, a / 31);
    (a / 12 + 1900, a % 12 + 1, d, h, mi)
}

fn join_minutes(y: u32, mo: u32, d: u32, h: u32, mi: u32) -> u32 {
    ((((y.wrapping_sub(1900)).wrapping_mul(12).wrapping_add(mo - 1)).wrapping_mul(31).wrapping_add(d - 1))
        .wrapping_mul(24)
        .wrapping_add(h))
    .wrapping_mul(60)
    .wrapping_add(mi)
}

fn days_in_month(y: u32, mo: u32) -> u32 {
    match mo {
        2 if y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400)) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01 of a Gregorian date.
fn days_from_civil(y: u32, mo: u32, d: u32) -> i64 {
    let y = i64::from(y) - i64::from(mo <= 2);
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * (i64::from(mo) + if mo > 2 { -3 } else { 9 }) + 2) / 5 + i64::from(d) - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

pub(crate) fn civil_from_days(days: i64) -> (u32, u32, u32) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let d = (doy - (153 * mp + 2) / 5 + 1) as u32;
    let mo = (if mp < 10 { mp + 3 } else { mp - 9 }) as u32;
    ((yoe + era * 400 + i64::from(mo <= 2)) as u32, mo, d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_has_whole_bytes() {
        assert_eq!(Oid(0).to_string(), "0x00");
        assert_eq!(Oid(0x102).to_string(), "0x0102");
        assert_eq!(Tid(0x040d_3092_e0b6_c866).to_string(), "0x040d3092e0b6c866");
    }

    #[test]
    fn tid_is_a_time() {
        assert_eq!(Tid::from_unix(0.0), Some(Tid(0x023c_2b00_0000_0000)));
        assert_eq!(Tid::from_unix(1_704_067_200.0), Some(Tid(0x03f5_8e00_0000_0000)));
        assert_eq!(Tid::from_unix(1_704_067_201.0), Some(Tid(0x03f5_8e00_0444_4444)));
        assert!((Tid(0x040d_3092_e0b6_c866).to_unix() - 1_795_362_412.667_342_7).abs() < 1e-5);
    }

    /// Wrapping arithmetic once made them large tids, and a pack as of them dropped all history.
    #[test]
    fn times_that_no_tid_tells_are_none() {
        for wrong in
            [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e30, -1e30, -1e10, START_OF_1900 - 1.0, LATEST]
        {
            assert_eq!(Tid::from_unix(wrong), None, "{wrong}");
        }
        assert_eq!(Tid::from_unix(START_OF_1900), Some(Tid::ZERO));
        let last = Tid::from_unix(LATEST - 1.0).unwrap();
        assert!(last.0 >> 63 == 1 && (last.to_unix() - LATEST + 1.0).abs() < 1e-3, "{last:?}");
    }

    #[test]
    fn later_than_carries_by_the_calendar() {
        assert_eq!(Tid(5).later_than(Tid(4)), Tid(5));
        assert_eq!(Tid(4).later_than(Tid(4)), Tid(5));
        assert_eq!(Tid(0).later_than(Tid(0x03f6_df7f_ffff_ffff)), Tid(0x03f6_eac0_0000_0000));
    }
}
