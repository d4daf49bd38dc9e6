//! The locks of the single-flight table. A model checker replaces them with its own.

pub(super) use std::sync::{Arc, Mutex, MutexGuard};
