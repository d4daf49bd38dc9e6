//! Integration tests: one module per operation, all in one binary.
#![allow(clippy::unwrap_used)]

mod archive;
mod cache;
mod cli;
mod commands;
mod common;
mod content;
mod damage;
mod erofs;
mod failures;
mod fuzz_seeds;
mod index;
mod interrupt;
mod kernel_cache;
mod layout;
mod life;
mod logins;
mod memory;
mod mount;
mod offline;
mod parallel;
mod prefetch;
mod progress;
mod reads;
mod redirects;
mod refusals;
mod registry;
mod single_flight;
mod status;
mod structure;
mod tls;
mod toc;
mod tree;
mod unprivileged;
mod waiting;
mod writable;
