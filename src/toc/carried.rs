//! Tables of contents that layers carry: the tables of eStargz and zstd:chunked.
//!
//! # How it works
//! Some writers end a layer's blob with a table of contents of their own. If the image's manifest has the digest of that
//! table, the table can be trusted as far as the manifest can. Then a reader needs no pass over the layer.
//!
//! ```text
//! annotations ──▶ TableRef ──▶ which bytes of the blob to fetch (`first_range`, `table_range`)
//!                    │
//!                    └─ read ──▶ digest ──▶ JSON, entry by entry ──▶ Builder ──▶ Tables, as a tar gives them
//!                                                              └────▶ ChunkTable: where content is, with digests
//! ```
//! | | table | its digest in the annotations | place of the table |
//! |---|---|---|---|
//! | eStargz | gzip, a tar of one file | of the JSON | a footer of 51 bytes, at the end of the blob |
//! | zstd:chunked of containers/storage | zstd frame | of the frame | an annotation |
//! | zstd:chunked of stargz-snapshotter | zstd frame | of the JSON and of the frame | an annotation |
//!
//! The entries go through the same builder as the entries of a tar, so names, attributes and device addresses follow the
//! same rules. Both lists have the files in the order of the tar. So content has the address that a pass over the layer
//! would give it.
//!
//! # What is not used
//! A table is used only if it says everything about the layer that a reader needs. Otherwise the layer is streamed like
//! any other. [`CarriedError::is_damage`] tells a table that should have been usable from one that is merely not
//! enough.
//!
//! # Invariants
//! - No byte of a table is interpreted before all of its digests match.
//! - Memory is bounded by the table's compressed size and what the charges allow.

mod annotations;
mod assembly;
mod error;
mod footer;
mod json;
mod read;
mod tables;
mod time;

pub use annotations::TableRef;
pub use error::CarriedError;
pub use footer::Footer;
pub use tables::CarriedTables;

/// Names of files in the root that writers of such tables add to a layer. They are no part of the image.
pub const ADDED: [&[u8]; 3] = [b"stargz.index.json", LANDMARK, b".no.prefetch.landmark"];

/// The file behind the content that the writer recommends to fetch first.
const LANDMARK: &[u8] = b".prefetch.landmark";
