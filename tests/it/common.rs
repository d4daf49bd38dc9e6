//! Helpers that several test modules share.

pub mod bound;
pub mod carried;
pub mod closed_port;
#[cfg(feature = "snapshotter")]
pub mod containerd;
pub mod disk;
pub mod docker_registry;
pub mod layers;
pub mod namespace;
pub mod nbd;
pub mod oci_layout;
pub mod ocifs;
pub mod reader;
pub mod registry;
