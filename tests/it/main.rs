//! Integration tests: one module per operation, all in one binary.
#![allow(clippy::unwrap_used)]

mod archive;
mod common;
mod erofs;
mod index;
mod layout;
mod registry;
mod structure;
mod toc;
mod tree;
