//! Makes table entries from what a tar's headers say: names, whiteouts, attribute filter, device addresses, limits,
//! warnings.
//!
//! The builder knows nothing about tar blocks. Other descriptions of a layer could use it to make the same
//! [`Toc`](super::Toc).

use std::ops::Range;

use super::codec::Packer;
use super::error::{TocError, shown};
use super::limits::SYMLINK_MAX;
use super::path::{self, EntryName};
use super::sparse::{self, Placed, SparsePiece};
use super::{DEVICE_BLOCK, DataLayout, EntryKind, Extent, ExtentTable, Limits, Metadata, Tables, TocEntry, Xattrs};
use crate::memory::Charge;

/// Most warnings that the builder keeps in full; it only counts the others.
const MAX_WARNINGS: usize = 32;

/// What entries of every kind have.
#[derive(Debug)]
pub(super) struct Item {
    /// Tar offset of the header, for messages.
    pub offset: u64,
    /// Name as the tar has it.
    pub name: Vec<u8>,
    pub meta: Metadata,
    /// Extended attributes that the filter keeps.
    pub xattrs: Xattrs,
}

/// The content of a regular file.
#[derive(Debug)]
pub(super) struct FileContent {
    /// Offset of the first byte in the tar.
    pub tar: u64,
    /// Bytes that the tar stores.
    pub stored: u64,
    /// Logical size in bytes, holes included.
    pub size: u64,
    /// Fragments of a sparse file; `None` for other files.
    pub map: Option<Vec<SparsePiece>>,
}

/// The table under construction. The builder packs each entry at once, so an entry takes little memory. Extents stay
/// unpacked, because the reader looks at them again.
#[derive(Debug)]
pub(super) struct Builder {
    limits: Limits,
    packer: Packer,
    extents: Vec<Extent>,
    device_size: u64,
    warnings: Vec<String>,
    charge: Charge,
    /// Fragments and chunks of sparse files, which count towards the limit of entries.
    pieces: usize,
    suppressed: usize,
}

impl Builder {
    pub fn new(limits: Limits, charge: Charge) -> Self {
        Self {
            limits,
            packer: Packer::default(),
            extents: Vec::new(),
            device_size: 0,
            warnings: Vec::new(),
            charge,
            pieces: 0,
            suppressed: 0,
        }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    pub fn warn(&mut self, text: impl FnOnce() -> String) {
        if self.warnings.len() < MAX_WARNINGS {
            self.warnings.push(text());
        } else {
            self.suppressed += 1;
        }
    }

    pub fn directory(&mut self, item: Item) -> Result<(), TocError> {
        self.add(item, EntryKind::Directory)
    }

    /// Adds an entry that is no directory and has neither content nor a target.
    pub fn special(&mut self, item: Item, kind: EntryKind) -> Result<(), TocError> {
        self.add(item, kind)
    }

    pub fn symlink(&mut self, mut item: Item, target: &[u8]) -> Result<(), TocError> {
        if target.is_empty() {
            self.warn(|| format!("symbolic link {} has no target and is left out", shown(&item.name)));
            return Ok(());
        }
        if target.len() > SYMLINK_MAX || target.contains(&0) {
            return Err(TocError::BadField {
                entry: shown(&item.name),
                offset: item.offset,
                field: "symbolic link target (at most 4095 bytes, no NUL)",
                value: shown(target),
            });
        }
        // lstat(2) shows this mode for every symbolic link. Tars have various modes there.
        item.meta.mode = 0o777;
        self.add(item, EntryKind::Symlink(target.into()))
    }

    pub fn hardlink(&mut self, item: Item, target: &[u8]) -> Result<(), TocError> {
        let target = path::canonical(target).map_err(|problem| TocError::BadName {
            entry: shown(&item.name),
            offset: item.offset,
            what: "the hard link target",
            problem,
        })?;
        if target.is_empty() {
            self.warn(|| format!("hard link {} has no target and is left out", shown(&item.name)));
            return Ok(());
        }
        self.add(item, EntryKind::Hardlink(target))
    }

    fn add(&mut self, item: Item, kind: EntryKind) -> Result<(), TocError> {
        let path = canonical_name(&item)?;
        match path::classify(&path) {
            EntryName::Visible if path.is_empty() && kind != EntryKind::Directory => {
                self.warn(|| {
                    format!(
                        "entry {} names the root but is no directory; it is left out",
                        shown(&item.name)
                    )
                });
                Ok(())
            }
            EntryName::Visible => self.push(TocEntry {
                path,
                kind,
                meta: item.meta,
                xattrs: item.xattrs,
            }),
            EntryName::Bookkeeping => Ok(()),
            place => self.mark(&item, place),
        }
    }

    /// Adds a regular file. Returns the range of extents that the stored bytes fill; the range is empty if the reader
    /// has to skip the bytes.
    pub fn regular(&mut self, item: Item, content: FileContent) -> Result<Range<usize>, TocError> {
        let first = self.extents.len();
        let path = canonical_name(&item)?;
        let hidden = match path::classify(&path) {
            EntryName::Visible => false,
            EntryName::Bookkeeping => true,
            place => {
                self.mark(&item, place)?;
                return Ok(first..first);
            }
        };
        if path.is_empty() {
            self.warn(|| {
                format!(
                    "entry {} names the root but is no directory; it is left out",
                    shown(&item.name)
                )
            });
            return Ok(first..first);
        }
        let placed = self.place(&item, content)?;
        self.device_size = placed.end;
        self.extents.extend_from_slice(&placed.extents);
        let kind = if hidden {
            EntryKind::Hidden(placed.data)
        } else {
            EntryKind::Regular(placed.data)
        };
        self.push(TocEntry {
            path,
            kind,
            meta: item.meta,
            xattrs: item.xattrs,
        })?;
        Ok(first..self.extents.len())
    }

    fn place(&mut self, item: &Item, content: FileContent) -> Result<Placed, TocError> {
        let FileContent { tar, stored, size, map } = content;
        let (device, limit) = (self.device_size, self.limits.device_size);
        let too_large = || TocError::TooLarge {
            entry: shown(&item.name),
            size,
            limit,
        };
        // Sizes are at most i64::MAX, so rounding up cannot overflow.
        if size.next_multiple_of(DEVICE_BLOCK) > limit {
            return Err(too_large());
        }
        if let Some(mut map) = map {
            sparse::check_map(&mut map, size, stored).map_err(|reason| TocError::BadSparse {
                entry: shown(&item.name),
                offset: item.offset,
                reason,
            })?;
            let whole = [SparsePiece { offset: 0, len: size }];
            if size > 0 && map != whole {
                self.check_map(map.len(), &item.name)?;
                self.count_pieces(map.len(), item)?;
                let placed = sparse::place_sparse(size, &map, tar, device, limit).ok_or_else(too_large)?;
                if let DataLayout::Chunked { chunks, .. } = &placed.data.layout {
                    self.count_pieces(chunks.len(), item)?;
                }
                return Ok(placed);
            }
        }
        if device + size.next_multiple_of(DEVICE_BLOCK) > limit {
            return Err(too_large());
        }
        Ok(sparse::place_flat(size, tar, device))
    }

    /// Charges for a sparse map of `pieces` fragments, and for the extents and chunks that the builder makes from it.
    pub fn check_map(&mut self, pieces: usize, name: &[u8]) -> Result<(), TocError> {
        let bytes = pieces * (size_of::<SparsePiece>() + size_of::<Extent>() + size_of::<(u32, u64)>());
        self.cover(bytes, name)
    }

    fn count_pieces(&mut self, pieces: usize, item: &Item) -> Result<(), TocError> {
        self.pieces += pieces;
        self.check_count(&item.name)
    }

    /// Checks the limits after an addition for the entry called `name`.
    fn check_count(&mut self, name: &[u8]) -> Result<(), TocError> {
        let limit = self.limits.entries;
        if self.packer.len() + self.pieces > limit {
            return Err(TocError::TooManyEntries {
                entry: shown(name),
                limit,
            });
        }
        self.cover(0, name)
    }

    /// Charges for everything that was added, and for `more` bytes.
    fn cover(&mut self, more: usize, name: &[u8]) -> Result<(), TocError> {
        let extents = self.extents.len() * size_of::<Extent>();
        let bytes = (self.packer.bytes() + extents + more) as u64;
        self.charge.cover(bytes).map_err(|source| TocError::TooMuchMemory {
            entry: shown(name),
            source,
        })
    }

    fn push(&mut self, entry: TocEntry) -> Result<(), TocError> {
        self.packer.add(&entry)?;
        self.check_count(&entry.path)
    }

    /// Adds a whiteout or opaque marker: an entry whose kind follows from its name alone.
    fn mark(&mut self, item: &Item, place: EntryName<'_>) -> Result<(), TocError> {
        let (path, kind) = match place {
            EntryName::Whiteout(path) => (path, EntryKind::Whiteout),
            EntryName::Opaque(dir) => (dir.into(), EntryKind::Opaque),
            EntryName::Meaningless | EntryName::Visible | EntryName::Bookkeeping => {
                self.warn(|| {
                    format!(
                        "entry {} has a reserved whiteout name and is left out",
                        shown(&item.name)
                    )
                });
                return Ok(());
            }
        };
        self.push(TocEntry {
            path,
            kind,
            meta: item.meta,
            xattrs: Vec::new(),
        })
    }

    pub fn finish(mut self) -> Result<Tables, TocError> {
        if self.suppressed > 0 {
            self.warnings.push(format!("and {} more warnings", self.suppressed));
        }
        Ok(Tables {
            toc: self.packer.finish(&self.extents, &self.warnings, self.device_size)?,
            extents: ExtentTable::new(&self.extents, self.device_size),
            warnings: self.warnings,
            charge: self.charge,
        })
    }
}

fn canonical_name(item: &Item) -> Result<Box<[u8]>, TocError> {
    path::canonical(&item.name).map_err(|problem| TocError::BadName {
        entry: shown(&item.name),
        offset: item.offset,
        what: "its name",
        problem,
    })
}
