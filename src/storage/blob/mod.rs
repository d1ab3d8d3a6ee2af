//! Blob directories: where the files of blobs are ([`layout`]), how they get there and away ([`dir`]), by what ([`names`]).
//!
//! A blob is an ordinary data record plus one file per revision, named by oid and tid. A file is in its final place,
//! synced, before a data record that refers to it is durable; a file that no record refers to is never read.

pub mod dir;
pub mod layout;
pub mod names;

pub use dir::{BlobDir, RECEIVED};
pub use layout::Layout;
pub use names::{FileNames, OsFileNames};
