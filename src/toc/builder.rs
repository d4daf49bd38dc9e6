//! Makes table entries from what a tar's headers say: names, whiteouts, attribute filter, device addresses, limits,
//! warnings.
//!
//! The builder knows nothing about tar blocks. The tables that layers carry go through it too ([`super::carried`]), so
//! both kinds of list make the same [`Toc`](super::Toc).

use std::ops::Range;

use super::codec::Packer;
use super::error::{TocError, shown};
use super::limits::SYMLINK_MAX;
use super::path::{self, EntryName};
use super::sparse::{self, Placed, SparsePiece};
use super::xattr::{self, Holder, RawXattrs};
use super::{
    DEVICE_BLOCK, DataLayout, DeviceNumber, EntryKind, Extent, ExtentTable, Limits, Metadata, Tables, TocEntry, Xattrs,
};
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

/// Name of a regular file that has a place in the data device.
struct NamedFile {
    path: Box<[u8]>,
    /// Whether the tree shows the file.
    visible: bool,
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

    /// Returns a user or group as chown(2) takes it from an engine that unpacks the layer. Of larger and negative
    /// numbers only the lowest 32 bits count. 4294967295 means "no change" to chown(2), which leaves root. `what` and
    /// `name` are for the warning.
    pub fn owner(&mut self, id: i64, what: &'static str, name: &[u8]) -> u32 {
        let owner = match id as u32 {
            u32::MAX => 0,
            low => low,
        };
        if i64::from(owner) != id {
            self.warn(|| format!("the {what} {id} of {} is out of range, {owner} is used", shown(name)));
        }
        owner
    }

    /// Returns the number of a device. Keeps the lowest 12 and 20 bits, for which mknod(2) has room.
    pub fn device_number(&mut self, major: i64, minor: i64, name: &[u8]) -> DeviceNumber {
        let number = DeviceNumber {
            major: (major & 0xfff) as u32,
            minor: (minor & 0xf_ffff) as u32,
        };
        if (i64::from(number.major), i64::from(number.minor)) != (major, minor) {
            self.warn(|| {
                format!(
                    "the device number {major}:{minor} of {} is out of range, {}:{} is used",
                    shown(name),
                    number.major,
                    number.minor
                )
            });
        }
        number
    }

    /// Returns those of an entry's extended attributes that the filter keeps. Gives `meta` the mode that an access
    /// control list stands for.
    pub fn attributes(
        &mut self,
        [schily, libarchive]: [RawXattrs; 2],
        holder: Holder,
        meta: &mut Metadata,
        name: &[u8],
    ) -> Xattrs {
        let mut dropped = |attribute: &[u8], why: &'static str| {
            self.warn(|| {
                format!(
                    "extended attribute {} of {} is dropped: {why}",
                    shown(attribute),
                    shown(name)
                )
            });
        };
        let mut xattrs = xattr::select(schily, libarchive, &mut dropped);
        xattr::fit(&mut xattrs, holder, meta, &mut dropped);
        xattrs
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
        if let Some(named) = self.name_file(&item)? {
            let placed = self.place(&item, content)?;
            self.add_file(item, named, placed)?;
        }
        Ok(first..self.extents.len())
    }

    /// Adds a regular file of `size` bytes, of which `runs` are content and the others are zeros. `runs` are in order,
    /// within the file and not empty. No tar is known, so the content counts as if it were in a tar where it is in the
    /// data device. Returns the file's offset in the data device, or none if nothing of the content is needed.
    pub fn regular_in_runs(&mut self, item: Item, size: u64, runs: &[Range<u64>]) -> Result<Option<u64>, TocError> {
        let Some(named) = self.name_file(&item)? else {
            return Ok(None);
        };
        self.cover(size_of_val(runs), &item.name)?;
        let device = self.device_size;
        let whole = FileContent {
            tar: device,
            stored: size,
            size,
            map: None,
        };
        let mut placed = self.place(&item, whole)?;
        self.count_pieces(runs.len().saturating_sub(1), &item)?;
        let extents = runs.iter().map(|run| Extent {
            tar: device + run.start,
            device: device + run.start,
            len: run.end - run.start,
        });
        placed.extents = extents.collect();
        self.add_file(item, named, placed)?;
        Ok(Some(device))
    }

    /// Returns the name of a regular file. Adds a marker if the name is that of a
    /// marker. Returns none if the file's content is not needed.
    fn name_file(&mut self, item: &Item) -> Result<Option<NamedFile>, TocError> {
        let path = canonical_name(item)?;
        let visible = match path::classify(&path) {
            EntryName::Visible => true,
            EntryName::Bookkeeping => false,
            place => {
                self.mark(item, place)?;
                return Ok(None);
            }
        };
        if path.is_empty() {
            self.warn(|| {
                format!(
                    "entry {} names the root but is no directory; it is left out",
                    shown(&item.name)
                )
            });
            return Ok(None);
        }
        Ok(Some(NamedFile { path, visible }))
    }

    fn add_file(&mut self, item: Item, named: NamedFile, placed: Placed) -> Result<(), TocError> {
        let NamedFile { path, visible } = named;
        self.device_size = placed.end;
        self.extents.extend_from_slice(&placed.extents);
        let kind = if visible {
            EntryKind::Regular(placed.data)
        } else {
            EntryKind::Hidden(placed.data)
        };
        self.push(TocEntry {
            path,
            kind,
            meta: item.meta,
            xattrs: item.xattrs,
        })
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
