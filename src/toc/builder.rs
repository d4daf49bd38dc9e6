//! Makes entries of what a tar's headers say: names, whiteouts, the attribute filter, device addresses, limits, warnings.
//!
//! Nothing here knows blocks, so that other descriptions of a layer can be turned into the same [`Toc`].

use std::ops::Range;

use super::error::{TocError, shown};
use super::path::{self, Place};
use super::sparse::{self, Fragment, Placed};
use super::{DEVICE_BLOCK, DataLayout, DeviceNumber, EntryKind, Limits, Metadata, Toc, TocEntry, Xattrs};

/// Warnings kept in full; the others are only counted.
const MAX_WARNINGS: usize = 32;

/// `linkpath` of a symbolic link: `PATH_MAX` less the NUL, what the kernel accepts.
pub(super) const SYMLINK_MAX: usize = 4095;

/// What all kinds of entries have.
#[derive(Debug)]
pub(super) struct Item {
    /// Offset of the header, for messages.
    pub offset: u64,
    /// As in the tar.
    pub name: Vec<u8>,
    pub meta: Metadata,
    /// Filtered.
    pub xattrs: Xattrs,
}

/// The content of a regular file.
#[derive(Debug)]
pub(super) struct Content {
    /// Offset in the tar.
    pub tar: u64,
    /// Bytes in the tar.
    pub stored: u64,
    /// Logical size.
    pub size: u64,
    /// Pieces, of a sparse file.
    pub map: Option<Vec<Fragment>>,
}

/// The table being made.
#[derive(Debug)]
pub(super) struct Builder {
    limits: Limits,
    toc: Toc,
    /// Pieces and chunks of sparse files, which count as entries.
    pieces: usize,
    /// Bytes of names, targets and attributes.
    text: usize,
    suppressed: usize,
}

impl Builder {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            toc: Toc::default(),
            pieces: 0,
            text: 0,
            suppressed: 0,
        }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn extents(&self) -> &[super::Extent] {
        &self.toc.extents
    }

    pub fn warn(&mut self, text: impl FnOnce() -> String) {
        if self.toc.warnings.len() < MAX_WARNINGS {
            self.toc.warnings.push(text());
        } else {
            self.suppressed += 1;
        }
    }

    pub fn directory(&mut self, item: Item) -> Result<(), TocError> {
        self.add(item, EntryKind::Directory)
    }

    /// Any kind that is neither a directory nor has content or a target.
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
        // lstat(2) of any symbolic link; tars have all sorts of things there.
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
            Place::Visible if path.is_empty() && kind != EntryKind::Directory => {
                self.warn(|| {
                    format!(
                        "entry {} names the root but is no directory; it is left out",
                        shown(&item.name)
                    )
                });
                Ok(())
            }
            Place::Visible => self.push(TocEntry {
                path,
                kind,
                meta: item.meta,
                xattrs: item.xattrs,
            }),
            Place::Bookkeeping => Ok(()),
            place => self.mark(&item, place),
        }
    }

    /// Adds a regular file; the extents that its stored bytes fill, an empty range if they are to be skipped.
    pub fn regular(&mut self, item: Item, content: Content) -> Result<Range<usize>, TocError> {
        let first = self.toc.extents.len();
        let path = canonical_name(&item)?;
        let hidden = match path::classify(&path) {
            Place::Visible => false,
            Place::Bookkeeping => true,
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
        self.toc.device_size = placed.end;
        self.toc.extents.extend_from_slice(&placed.extents);
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
        Ok(first..self.toc.extents.len())
    }

    fn place(&mut self, item: &Item, content: Content) -> Result<Placed, TocError> {
        let Content { tar, stored, size, map } = content;
        let (device, limit) = (self.toc.device_size, self.limits.device_size);
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
            let whole = [Fragment { offset: 0, len: size }];
            if size > 0 && map != whole {
                self.count_pieces(map.len())?;
                let placed = sparse::place_sparse(size, &map, tar, device, limit).ok_or_else(too_large)?;
                if let DataLayout::Chunked { chunks, .. } = &placed.data.layout {
                    self.count_pieces(chunks.len())?;
                }
                return Ok(placed);
            }
        }
        if device + size.next_multiple_of(DEVICE_BLOCK) > limit {
            return Err(too_large());
        }
        Ok(sparse::place_flat(size, tar, device))
    }

    fn count_pieces(&mut self, pieces: usize) -> Result<(), TocError> {
        self.pieces += pieces;
        self.check_count()
    }

    fn check_count(&self) -> Result<(), TocError> {
        let limit = self.limits.entries;
        if self.toc.entries.len() + self.pieces > limit {
            return Err(TocError::TooManyEntries { limit });
        }
        let limit = self.limits.text;
        if self.text > limit {
            return Err(TocError::TooMuchText { limit });
        }
        Ok(())
    }

    fn push(&mut self, entry: TocEntry) -> Result<(), TocError> {
        let target = match &entry.kind {
            EntryKind::Symlink(target) | EntryKind::Hardlink(target) => target.len(),
            _ => 0,
        };
        let xattrs = entry.xattrs.iter().map(|(name, value)| name.len() + value.len());
        self.text += entry.path.len() + target + xattrs.sum::<usize>();
        self.toc.entries.push(match entry.kind {
            // What overlayfs takes for a whiteout, and thus what every engine built on it shows as one.
            EntryKind::CharDevice(DeviceNumber { major: 0, minor: 0 }) => TocEntry {
                kind: EntryKind::Whiteout,
                xattrs: Vec::new(),
                ..entry
            },
            _ => entry,
        });
        self.check_count()
    }

    /// An entry whose name alone says what it is.
    fn mark(&mut self, item: &Item, place: Place<'_>) -> Result<(), TocError> {
        let (path, kind) = match place {
            Place::Whiteout(path) => (path, EntryKind::Whiteout),
            Place::Opaque(dir) => (dir.into(), EntryKind::Opaque),
            Place::Meaningless | Place::Visible | Place::Bookkeeping => {
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

    pub fn finish(mut self) -> Toc {
        if self.suppressed > 0 {
            self.toc.warnings.push(format!("and {} more warnings", self.suppressed));
        }
        self.toc
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
