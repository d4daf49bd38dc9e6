//! What an OCI runtime needs to run a container from an image: its configuration (runtime-spec config.md).
//!
//! The image config says which program runs, as whom, where and with which environment. Everything else is what
//! container engines agree on: the file systems of the kernel, a few capabilities, namespaces.
//!
//! Modules: [`Account`] finds the user and the groups in the image's own files; [`ContainerConfig`] makes the
//! configuration, and the command line of bubblewrap for the same container.

mod account;
mod bubblewrap;
mod container;

pub use account::{Account, AccountError};
pub use container::{BundleError, ContainerConfig, Network};
