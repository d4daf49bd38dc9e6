//! The vocabulary of the OCI image and distribution specifications: pure values, no I/O.
//!
//! Documents are read from raw bytes in two steps. [`classify`] says what a document is. [`ImageIndex::parse`],
//! [`Manifest::parse`] and [`ImageConfig::parse`] then return its content.
//!
//! [`platform::choose`] picks the entry of an image index. [`Manifest::refusal`] and [`ImageConfig::check`] tell
//! images from everything else that registries keep.

mod config;
mod descriptor;
mod digest;
mod document;
mod image_ref;
pub mod media_type;
mod mountable;
pub mod platform;
mod reference;
mod refusal;
mod selector;
mod shown;

pub use config::{Empty, ImageConfig, RootFs, RunConfig};
pub use descriptor::{Descriptor, Platform};
pub use digest::{Algorithm, DiffId, Digest, DigestError, DigestHasher};
pub use document::{DocumentError, DocumentKind, ImageIndex, MAX_DOCUMENT, MAX_LAYERS, Manifest, classify};
pub(crate) use image_ref::listing;
pub use image_ref::{ImageRef, ImageRefError};
pub(crate) use mountable::is_companion;
pub use platform::PlatformError;
pub use reference::{Reference, ReferenceError};
pub use refusal::Refusal;
pub use selector::ReferenceSelector;
pub(crate) use shown::shown;
