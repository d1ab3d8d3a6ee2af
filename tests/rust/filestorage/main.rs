//! The FileStorage engine against a model of what it should hold ([`model`]), through crashes at every write and sync
//! ([`crash`]), and beside the files around Data.fs ([`files`]).

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod crash;
mod disk;
mod files;
mod model;
