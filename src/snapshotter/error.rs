//! Why a snapshotter cannot do what it is asked.

use std::io;
use std::path::{Path, PathBuf};

use crate::task::TaskError;

/// Why a snapshotter cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// There is no snapshot of this name.
    #[error("snapshot {name:?} does not exist")]
    NotFound {
        /// The name that was asked for.
        name: String,
    },
    /// A snapshot of this name exists. Of a layer that is read lazily this is the good answer: nobody has to fetch it.
    #[error("snapshot {name:?} exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// The snapshot is not in the state that the request needs.
    #[error("snapshot {name:?} {reason}")]
    State {
        /// The name.
        name: String,
        /// What is in the way.
        reason: &'static str,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Argument(String),
    /// The mount of an image is in trouble.
    #[error("image {image}: {reason}")]
    Image {
        /// The image's name and digest.
        image: String,
        /// What the process that serves it says, or what is known of that process.
        reason: String,
    },
    /// The table of snapshots could not be read or written.
    #[error("table of snapshots {}: {source}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// The database's error.
        source: Box<redb::Error>,
    },
    /// A line of the table of snapshots makes no sense.
    #[error("table of snapshots {}: snapshot {name:?}: {reason}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The snapshot.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A file or directory could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A task of this program ended early.
    #[error(transparent)]
    Task(#[from] TaskError),
}

impl SnapshotError {
    /// Returns a function that makes the error of a file or directory.
    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io {
            path: path.clone(),
            source,
        }
    }

    /// The error of a name that no snapshot has.
    pub(super) fn not_found(name: &str) -> Self {
        Self::NotFound { name: name.to_owned() }
    }
}
