//! Layers that carry a table of contents: eStargz and zstd:chunked.

mod damage;
mod lazy;
mod merging;
mod mounts;
mod scene;
mod tables;
mod unfetched;
