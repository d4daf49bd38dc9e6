//! Images in registries: the pull side of the OCI distribution specification.
//!
//! A [`RegistryClient`] is shared by a process and holds what is worth sharing: connection pools, challenges and tokens,
//! redirects, and measurements of the hosts spoken to. [`RegistrySource`] is one image reference seen through it, an
//! [`ImageSource`](crate::blob::ImageSource); [`RegistryBlob`] one blob, a [`BlobSource`](crate::blob::BlobSource).
//!
//! # How it works
//! - **Round trips.** A manifest is one GET, by tag or digest; there is no ping and no HEAD. A 401 costs a token and a second
//!   GET, once: later requests of the repository carry the token at once.
//! - **Credentials** are a [`CredentialSource`] asked again whenever a token must be made; see [`credentials`].
//! - **Redirects** are followed by hand; credentials stay at the first origin, and the final URL of a blob is used directly
//!   until it expires.
//! - **Streams** resume at the exact offset after transient failures, within the deadline of [`RegistryConfig::timeout`];
//!   the rules are in [`crate::blob::retry`].
//! - **Embedding**: [`Puller`] has the five operations a program that only pulls wants.
//!
//! # Invariants
//! - Documents hash to the digest asked for. Blob bytes are not verified here; their number and place are.
//! - No secret is sent anywhere but to the registry and the token server it names, over TLS unless the registry has none;
//!   none is logged, put into an error or written down.
//! - A body is never held whole, documents (at most 16 MiB) apart.
//!
//! The parsers of what servers send are pure: [`challenge::parse`], [`content_range::ContentRange::parse`],
//! [`encoding::decode`], [`expiry::url_lifetime`], [`token::parse`], [`failure::message`], [`credentials::AuthFile::parse`].

mod access;
mod auth;
mod blob;
pub mod challenge;
mod client;
mod config;
pub mod content_range;
pub mod credentials;
mod documents;
mod elsewhere;
pub mod encoding;
mod endpoint;
pub mod expiry;
pub mod failure;
mod puller;
mod redirects;
mod secret;
mod source;
mod stats;
pub mod token;
mod transport;

pub use blob::RegistryBlob;
pub use client::RegistryClient;
pub use config::RegistryConfig;
pub use credentials::{Anonymous, ConfigFiles, Credential, CredentialSource, Fixed, Lookup};
pub use documents::{MAX_CONFIG, MAX_MANIFEST};
pub use endpoint::PlainHttp;
pub use puller::{PulledImage, Puller};
pub use secret::Secret;
pub use source::RegistrySource;
pub use stats::{BlobStats, HostStats};
