//! ocifs mounts an OCI or Docker image as a root file system and fetches only the bytes that are read.
//!
//! An image is a stack of compressed tars. A tar has no table of contents, and a compressed one has no random access. ocifs
//! gives every layer both. It merges the layers' tables once into one immutable tree, and serves that tree through thin
//! doors.
//!
//! # Embedding
//! A program serves any number of images with one [`layer::LayerContext`]. Images that have a layer in common share its
//! index, its data device and its requests.
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use ocifs::content::Content;
//! use ocifs::fs::ImageFs;
//! use ocifs::image::{Confirm, NamedImage};
//! use ocifs::layer::LayerContext;
//! use ocifs::registry::RegistryConfig;
//! use ocifs::source;
//! use ocifs::store::Store;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Store::open("/var/lib/ocifs".as_ref())?;
//! // 64 MiB of memory for decoded data, 10 GiB of disk for cached data.
//! let context = LayerContext::new(store.clone(), 64 << 20, 10 << 30);
//! let named = source::open(&"alpine:latest".parse()?, RegistryConfig::default()).await?;
//! let opening = NamedImage::new(named, None, store, Confirm::default()).open(&context, None).await?;
//! let image = opening.preparation.finish(&context).await?;
//! let fs = ImageFs::new(Arc::new(Content::new(image, Some(Duration::from_secs(30)))));
//! let etc = fs.lookup(fs.root(), b"etc")?.ok_or("there is no /etc")?;
//! let release = fs.lookup(etc.ino, b"alpine-release")?.ok_or("this is not Alpine")?;
//! println!("{}", String::from_utf8_lossy(&fs.read(release.ino, 0, 4096).await?));
//! # Ok(())
//! # }
//! ```
//!
//! # Runtime
//! The async functions of this crate need tokio's multi-thread runtime. They read and write local files with
//! `tokio::task::block_in_place`, which hands the thread's other tasks to another thread, and which panics on a
//! current-thread runtime. Most of these reads come from the page cache, and a task of its own for each would cost more
//! than the read.
//!
//! # Glossary
//! The words below mean one thing everywhere in this crate.
//!
//! | word | meaning | not |
//! |---|---|---|
//! | *digest* | algorithm and hash of exact bytes ([`oci::Digest`]) | checksum, id |
//! | *diffID* | digest of a layer's uncompressed tar ([`oci::DiffId`]) | layer id |
//! | *descriptor* | media type, digest and size of a blob | pointer |
//! | *image index* | OCI document listing manifests by platform | index (alone), manifest list |
//! | *blob* | content-addressed bytes in an image source | file, object |
//! | *bundle* | directory with a root and the configuration of a container ([`bundle::ContainerConfig`]) | container |
//! | *layer* | one tar of an image, compressed or not | snapshot |
//! | *TOC* | what is where in a layer's tar ([`toc::Toc`]) | file list |
//! | *span* | run of tar bytes that is decoded, verified and cached as a unit | chunk, block |
//! | *chunk* | run of a file's content of which the layer's own table has a digest ([`toc::Chunk`]); a span of such a layer | block |
//! | *restart* | place in a compressed blob where decoding can begin; a gzip one carries a *window* | checkpoint table |
//! | *span index* | spans, restarts and digests of one layer ([`index::SpanIndex`]) | index (alone) |
//! | *index file* | the index of one layer as a file for other hosts ([`published::IndexFile`]) | artifact |
//! | *location* | place where index files are looked for | mirror |
//! | *authority* | who vouches for the index of a layer: a pass, the manifest, a key, a location ([`store::Authority`]) | origin |
//! | *snapshot* | what containerd prepares, commits and mounts ([`snapshotter::SnapshotRecord`]) | layer, tree |
//! | *span map* | a layer's spans by device address, from whatever source ([`span::SpanMap`]) | span table |
//! | *data device* | a layer's file contents in tar order, each file at a 4096-byte boundary | cache file |
//! | *extent* | run of bytes at the same time contiguous in tar and data device | segment |
//! | *flight* | a fetch of spans in progress, with all readers that wait for it | request |
//! | *door* | way for others to reach an image: a FUSE directory, the kernel's EROFS, the disk as a file, NBD, vhost-user-blk | front end |
//! | *tree* | merged view of all layers ([`tree::Tree`]) | snapshot, rootfs |
//! | *ino* | inode number; the EROFS nid, the same on every host | handle |
//! | *whiteout* | tar entry that hides a lower layer's entry | deletion |
//!
//! # Modules, lowest first
//! A module uses only modules of lower levels; a test holds the source against this table.
//!
//! | level | modules |
//! |---|---|
//! | 0 | [`oci`] `memory` `os` `task` |
//! | 1 | [`blob`] [`bundle`] [`index`] [`toc`] [`store`] [`profile`] `program` |
//! | 2 | `tarfile` [`resolve`] [`tree`] [`span`] |
//! | 3 | [`layout`] [`archive`] [`registry`] [`device`] `fetch` [`erofs`] |
//! | 4 | [`source`] [`published`] |
//! | 5 | [`layer`] |
//! | 6 | [`image`] |
//! | 7 | [`content`] |
//! | 8 | [`fs`] [`disk`] |
//! | 9 | `fuse` [`nbd`] [`vhost_blk`] |
//! | 10 | [`mount`] |
//! | 11 | [`snapshotter`] |
//! | 12 | `cli`, which is the command and no part of the library |

pub mod archive;
pub mod blob;
pub mod bundle;
pub mod content;
pub mod device;
pub mod disk;
pub mod erofs;
mod fetch;
pub mod fs;
mod fuse;
pub mod image;
pub mod index;
pub mod layer;
pub mod layout;
mod memory;
pub mod mount;
pub mod nbd;
pub mod oci;
// For the command of this package, which polls and removes files as the library does.
#[doc(hidden)]
pub mod os;
pub mod profile;
mod program;
pub mod published;
pub mod registry;
pub mod resolve;
#[cfg(feature = "snapshotter")]
pub mod snapshotter;
pub mod source;
pub mod span;
pub mod store;
mod tarfile;
mod task;
pub mod toc;
pub mod tree;
pub mod vhost_blk;

pub use task::TaskError;

#[cfg(any(doc, doctest))]
pub mod docs {
    //! The longer pages of the documentation.

    #[doc = include_str!("docs/architecture.md")]
    pub mod architecture {}

    #[doc = include_str!("docs/containerd.md")]
    pub mod containerd {}

    #[doc = include_str!("docs/changelog.md")]
    pub mod changelog {}

    #[doc = include_str!("docs/indexes.md")]
    pub mod indexes {}

    #[doc = include_str!("docs/json.md")]
    pub mod json {}

    #[doc = include_str!("docs/metrics.md")]
    pub mod metrics {}

    #[doc = include_str!("docs/microvm.md")]
    pub mod microvm {}

    #[doc = include_str!("docs/services.md")]
    pub mod services {}

    #[doc = include_str!("docs/registries.md")]
    pub mod registries {}

    #[doc = include_str!("docs/recipes.md")]
    pub mod recipes {}

    #[doc = include_str!("docs/semantics.md")]
    pub mod semantics {}

    #[doc = include_str!("docs/troubleshooting.md")]
    pub mod troubleshooting {}
}
