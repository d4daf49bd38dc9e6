//! The locks of the single-flight table. A model checker puts its own in their place.

pub(super) use std::sync::{Arc, Mutex, MutexGuard};
