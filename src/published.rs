//! Indexes of layers that somebody else has made: the files, the places where they are, and when they are believed.
//!
//! One host makes the index of a layer once, and other hosts open the layer with it at once. An index decides what the
//! files of a layer contain, so ocifs believes only an index that the user trusts: it is signed with a key that the user
//! named, or it comes from a place that the user trusts as such.
//!
//! ```text
//! IndexFile     the index of one layer as one file
//! FileName      how files are named in every place
//! Trust         who vouches for the files of a place
//! IndexPlace    a directory, a web server or a repository of a registry
//! Locations     all places of a process: asks them all at once for what an image needs
//! LookupPatience how long an opening waits for an answer
//! Comparison    compares what the places have with what a pass on this host made
//! PublishedFile a file to be published, and its signature
//! Publisher     writes files to a place
//! ```
//!
//! Invariants:
//! - No byte of a file is parsed before its trust is established: its signature matches, or its place is trusted.
//! - A file that is missing, damaged, unsigned or of another layer costs a line in the log and the time of one request,
//!   never an error: the layer is then streamed.
//! - Every wait is bounded. After a few seconds, layers are streamed beside the question. A place that is in trouble is left
//!   alone for a while.
//! - Without a place, no request is made.

mod absence;
mod asked;
mod compare;
mod directory;
mod error;
mod index_file;
mod lists;
mod lookup;
mod name;
mod offers;
mod patience;
mod place;
mod published_file;
mod publisher;
mod repository;
mod trust;
mod trusted;

pub use compare::{Compared, Comparison, Difference};
pub use error::PublishedError;
pub use index_file::IndexFile;
pub use lookup::{FoundIndex, IndexOffers, Locations, Lookups};
pub use name::FileName;
pub use patience::LookupPatience;
pub use place::{IndexLocation, IndexPlace};
pub use published_file::PublishedFile;
pub use publisher::{Publisher, Pushed};
pub use trust::{IndexKey, Trust};
