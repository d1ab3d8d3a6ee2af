//! Names inside a blob directory: pure functions from (oid, tid) to relative paths and back.
//!
//! `bushy` and `lawn` are ZODB's server layouts, `zeocache` is the one of a ZEO client's private blob cache.
//! Source: `ZODB.blob` (layouts, `.layout` marker), `ZEO.ClientStorage` (`zeocache`).

use std::fmt;
use std::path::{Path, PathBuf};

use crate::ids::{Oid, Tid};

/// File that names the layout, in the blob directory itself.
pub const MARKER: &str = ".layout";
/// Directory of uncommitted files.
pub const TEMP: &str = "tmp";
/// Ending of committed files.
pub const SUFFIX: &str = ".blob";
/// Buckets of the `zeocache` layout.
const CACHE_BUCKETS: u64 = 997;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One directory level per oid byte: `0x00/…/0x12/0x34/0x03f5….blob`.
    Bushy,
    /// One directory per object: `0x1234/0x03f5….blob`. Deprecated in ZODB.
    Lawn,
    /// `<oid mod 997>/<oid div 997>.<tid, 16 hex digits>.blob`.
    ZeoCache,
}

impl Layout {
    /// Content of the marker file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bushy => "bushy",
            Self::Lawn => "lawn",
            Self::ZeoCache => "zeocache",
        }
    }

    /// The layout a marker names; `None` for an unknown one.
    pub fn from_marker(content: &str) -> Option<Self> {
        match content.trim() {
            "bushy" => Some(Self::Bushy),
            "lawn" => Some(Self::Lawn),
            "zeocache" => Some(Self::ZeoCache),
            _ => None,
        }
    }

    /// Directory of an object's committed files, relative to the blob directory.
    pub fn oid_dir(self, oid: Oid) -> PathBuf {
        match self {
            Self::Bushy => oid.to_bytes().iter().map(|byte| format!("0x{byte:02x}")).collect(),
            Self::Lawn => PathBuf::from(oid.to_string()),
            Self::ZeoCache => PathBuf::from((oid.0 % CACHE_BUCKETS).to_string()),
        }
    }

    /// File name of a revision inside [`Self::oid_dir`].
    pub fn file_name(self, oid: Oid, tid: Tid) -> String {
        match self {
            Self::Bushy | Self::Lawn => format!("{tid}{SUFFIX}"),
            Self::ZeoCache => format!("{}.{:016x}{SUFFIX}", oid.0 / CACHE_BUCKETS, tid.0),
        }
    }

    /// File of a revision, relative to the blob directory.
    pub fn file(self, oid: Oid, tid: Tid) -> PathBuf {
        self.oid_dir(oid).join(self.file_name(oid, tid))
    }

    /// Directory levels between the blob directory and a file.
    pub fn depth(self) -> usize {
        match self {
            Self::Bushy => 8,
            Self::Lawn | Self::ZeoCache => 1,
        }
    }

    /// The object and revision of a file given relative to the blob directory; `None` for any other file.
    pub fn parse(self, relative: &Path) -> Option<(Oid, Tid)> {
        let parts: Vec<&str> = relative.iter().map(|part| part.to_str()).collect::<Option<_>>()?;
        let (name, dirs) = parts.split_last()?;
        if dirs.len() != self.depth() {
            return None;
        }
        let stem = name.strip_suffix(SUFFIX)?;
        let (oid, tid) = match self {
            Self::Bushy => {
                let oid = dirs.iter().try_fold(0u64, |oid, dir| Some(oid << 8 | hex(dir, 2)?))?;
                (oid, hex(stem, 16)?)
            }
            Self::Lawn => (hex(dirs.first()?, 16)?, hex(stem, 16)?),
            Self::ZeoCache => {
                let (quotient, tid) = stem.split_once('.')?;
                let bucket: u64 = dirs.first()?.parse().ok().filter(|bucket| *bucket < CACHE_BUCKETS)?;
                let quotient: u64 = quotient.parse().ok()?;
                (
                    quotient.checked_mul(CACHE_BUCKETS)?.checked_add(bucket)?,
                    u64::from_str_radix(tid, 16).ok()?,
                )
            }
        };
        Some((Oid(oid), Tid(tid)))
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `0x` and 1 to `digits` hex digits.
fn hex(text: &str, digits: usize) -> Option<u64> {
    let text = text.strip_prefix("0x")?;
    let valid = (1..=digits).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    u64::from_str_radix(text, 16).ok().filter(|_| valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_zodbs() {
        let (oid, tid) = (Oid(0x1234), Tid(0x03f5_8e00_2aaa_aaaa));
        let bushy = "0x00/0x00/0x00/0x00/0x00/0x00/0x12/0x34/0x03f58e002aaaaaaa.blob";
        assert_eq!(Layout::Bushy.file(oid, tid), Path::new(bushy));
        assert_eq!(Layout::Lawn.file(oid, tid), Path::new("0x1234/0x03f58e002aaaaaaa.blob"));
        assert_eq!(Layout::Lawn.oid_dir(Oid(0)), Path::new("0x00"));
        let cache = "6/2.040d30a46ef2a722.blob";
        assert_eq!(Layout::ZeoCache.file(Oid(2000), Tid(0x040d_30a4_6ef2_a722)), Path::new(cache));
    }

    #[test]
    fn names_parse_back() {
        for layout in [Layout::Bushy, Layout::Lawn, Layout::ZeoCache] {
            assert_eq!(Layout::from_marker(&format!("{layout}\n")), Some(layout));
            for (oid, tid) in [(0, 0), (7, 1), (u64::MAX, u64::MAX), (0x100, 0x03f5_8e00_0000_0000)] {
                let (oid, tid) = (Oid(oid), Tid(tid));
                assert_eq!(layout.parse(&layout.file(oid, tid)), Some((oid, tid)), "{layout}");
            }
            for other in
                ["", "tmp/x.blob", "0x00/x.blob", "0x00/0x1.blob.tmp", "998/1.0.blob", "0x00/+1.blob"]
            {
                assert_eq!(layout.parse(Path::new(other)), None, "{layout} {other}");
            }
        }
    }
}
