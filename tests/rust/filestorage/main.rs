//! The FileStorage engine against a model of what it should hold ([`model`]), through crashes at every write and sync
//! ([`crash`]), with damaged bytes ([`damage`]), and the files around Data.fs ([`files`]); transactions and packs with
//! blobs through crashes at every operation on names ([`blobs`]).

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod blobs;
mod crash;
mod damage;
mod disk;
mod files;
mod model;
mod names;
