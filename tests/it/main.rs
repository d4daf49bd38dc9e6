//! Integration tests: one module per operation, all in one binary.
#![allow(clippy::unwrap_used)]

mod common;
