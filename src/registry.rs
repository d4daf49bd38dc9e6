//! Images in registries: the pull side of the OCI distribution specification, and small files beside them.
//!
//! A process shares one [`RegistryClient`]. The client holds connection pools, challenges and tokens, redirects, and
//! measurements of hosts. A [`RegistrySource`] is one image reference read through the client, an
//! [`ImageSource`](crate::blob::ImageSource). A [`RegistryBlob`] is one blob, a
//! [`BlobSource`](crate::blob::BlobSource).
//!
//! # How it works
//! - **Round trips.** The client fetches a manifest with one GET, by tag or digest. It sends no HEAD, and no ping
//!   before the GET. The first 401 costs a token request and a second GET. Later requests to the repository carry the
//!   token from the start. If a 401 names no scheme, the client asks the base of the API for it.
//! - **Places.** The files of this machine name mirrors, certificates and the like; see [`HostFiles`]. Mirrors are asked
//!   before the registry, and left for the next place if they fail (`places`).
//! - **Credentials.** The client asks its [`CredentialSource`] each time it makes a token; see [`credentials`].
//! - **Redirects.** The client follows redirects itself. Credentials stay at the first origin. Further requests for a
//!   blob go to its final URL directly, until that URL expires.
//! - **Streams.** A stream resumes at the exact offset after a transient failure, within the deadline of
//!   [`RegistryConfig::timeout`]. The rules are in `crate::blob::retry`.
//! - **Files.** A [`FileRepository`] has small files, which can also be pushed: a HEAD and two requests for each that is not
//!   there, and one for the manifest that lists them.
//! - **Embedding.** [`Puller`] offers five operations for programs that only pull.
//!
//! # Invariants
//! - Documents hash to the requested digest.
//! - Blob bytes are not verified here. Their number and place are verified, as far as the response's headers state
//!   them.
//! - A secret goes only to the registry or mirror it is for, and to the token server that this host names.
//! - Secrets go over TLS, unless the registry has none or the token server is on this machine.
//! - No secret is logged, put into an error or written to disk.
//! - The client never holds a whole body, except documents (at most 16 MiB), token responses and tag lists (at most 1
//!   MiB).
//!
//! The parsers of server responses are pure: bytes or text in, values out. They are in `challenge`, `content_range`,
//! `encoding`, `expiry`, `token`, `failure` and [`credentials`]. Those of the files about registries are in `hosts`.

mod access;
mod auth;
mod blob;
mod challenge;
mod client;
mod config;
mod content_range;
pub mod credentials;
mod documents;
mod elsewhere;
mod encoding;
mod endpoint;
mod expiry;
mod failure;
mod files;
mod host_settings;
mod hosts;
mod places;
mod puller;
mod redirects;
mod secret;
mod source;
mod stats;
mod token;
mod transport;

pub use blob::RegistryBlob;
pub use client::RegistryClient;
pub use config::RegistryConfig;
pub use credentials::{Anonymous, ConfigFiles, Credential, CredentialSource, Fixed, Lookup};
pub use documents::{MAX_CONFIG, MAX_MANIFEST};
pub use endpoint::PlainHttp;
pub use files::FileRepository;
pub use hosts::{HostFiles, HostsFrom};
pub use puller::{PulledImage, Puller};
pub use reqwest::Url;
pub use secret::Secret;
pub use source::RegistrySource;
pub use stats::{BlobStats, HostStats};

#[cfg(fuzzing)]
pub mod parsers {
    //! The parsers of server responses, for fuzzing.

    pub use super::challenge::parse as parse_challenge;
    pub use super::content_range::ContentRange;
    pub use super::failure::message as parse_error;
    pub use super::token::parse as parse_token;
}
