//! What can be wrong with published files and their places.

use std::path::{Path, PathBuf};

use crate::blob::BlobError;

/// Why a published file cannot be used, found or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishedError {
    /// The location is none that ocifs can use.
    #[error("index location `{location}`: {reason}")]
    Location {
        /// The location as it was written.
        location: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A key cannot be read.
    #[error("index key `{key}`: {reason}")]
    Key {
        /// The key or its file.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file has no signature beside it.
    #[error("{file} has no signature")]
    Unsigned {
        /// Name of the file.
        file: String,
    },
    /// The signature is not one of the file with the key.
    #[error("the signature of {file} does not fit the key {key}: {reason}")]
    Signature {
        /// Name of the file.
        file: String,
        /// Name of the key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// The file is not what it should be.
    #[error("{file} is no usable index: {reason}")]
    Format {
        /// Name of the file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A file of a directory cannot be read or written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What failed.
        reason: String,
    },
    /// There is no directory at a place.
    #[error("there is no such directory: {}", path.display())]
    NoDirectory {
        /// The place.
        path: PathBuf,
    },
    /// A place was not asked, because it was in trouble before.
    #[error("{place} was not asked again: {reason}")]
    NotAsked {
        /// The place.
        place: String,
        /// What happened before.
        reason: String,
    },
    /// A registry or a web server cannot be asked, or refuses.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A place does not answer in time.
    #[error("{place} did not answer within {seconds} s")]
    Timeout {
        /// The place.
        place: String,
        /// The time that passed.
        seconds: u64,
    },
    /// A place has something else under a name.
    #[error("{place} has another {file}: look at it, and push with --replace to overwrite it")]
    Occupied {
        /// The place.
        place: String,
        /// Name of the file, or the tag.
        file: String,
    },
    /// A file has no signature, but the file that it would overwrite has one.
    #[error(
        "{place} has another {file}, with a signature: sign the new one, or push with --replace to lose the signature"
    )]
    Signed {
        /// The place.
        place: String,
        /// Name of the file.
        file: String,
    },
    /// Nothing can be written to the place.
    #[error("{place} cannot be written: push to a directory or a registry")]
    ReadOnly {
        /// The place.
        place: String,
    },
}

impl PublishedError {
    /// Makes an error about a file or directory.
    pub(super) fn file(path: &Path, reason: &dyn std::fmt::Display) -> Self {
        Self::File {
            path: path.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// Makes an error about a file that is not what it should be.
    pub(super) fn format(file: &str, reason: impl Into<String>) -> Self {
        Self::Format {
            file: file.to_owned(),
            reason: reason.into(),
        }
    }
}
