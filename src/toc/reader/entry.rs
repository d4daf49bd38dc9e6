//! Makes an entry from its headers: what the type flag means, which field counts, how the content is mapped.

use super::{Pending, SparseFile, TarReader, TarState, clip, pad, padding};
use crate::toc::builder::{FileContent, Item};
use crate::toc::error::{TocError, shown};
use crate::toc::header::{self, NumericField, TarBlock, TarHeader};
use crate::toc::pax::Pax;
use crate::toc::sparse::{MapParser, SparsePiece};
use crate::toc::xattr::Holder;
use crate::toc::{EntryKind, Metadata};

impl TarReader {
    /// Handles a header that describes an entry, together with the extended headers before it.
    pub(super) fn entry(&mut self, header: TarHeader<'_>, offset: u64, flag: u8) -> Result<(), TocError> {
        let Pending {
            pax,
            long_name,
            long_link,
            ..
        } = std::mem::take(&mut self.pending);
        let mut pax = pax.unwrap_or_default();
        pax.sparse = pax.sparse.of_sparse_file();
        let regular = matches!(flag, b'0' | 0 | b'7');
        let real_name = pax.sparse.name.take().filter(|_| regular);
        // The order of Go's reader, so that all engines agree: GNU.sparse.name, GNU long name, pax path, header.
        let name = real_name
            .map(Vec::from)
            .or(long_name)
            .or(pax.path.take().map(Vec::from));
        self.name = name.unwrap_or_else(|| header.name());
        let flag = if flag == 0 && self.name.ends_with(b"/") {
            b'5'
        } else {
            flag
        };
        if !matches!(flag, b'0'..=b'7' | 0 | b'S' | b'D') {
            let size = self.size(&header, offset, pax.size)?;
            self.pass_over(flag, size);
            return Ok(());
        }
        let item = self.item(&header, offset, flag, &mut pax)?;
        // Types without data use the size field for other things. In a hard link it is the size of the target.
        self.state = padding(0);
        match flag {
            b'1' | b'2' => {
                let link = long_link
                    .or(pax.link.map(Vec::from))
                    .unwrap_or_else(|| header.link().to_vec());
                if flag == b'1' {
                    self.builder.hardlink(item, &link)
                } else {
                    self.builder.symlink(item, &link)
                }
            }
            b'3' | b'4' => {
                let kind = self.device(&header, offset, flag)?;
                self.builder.special(item, kind)
            }
            b'5' => self.builder.directory(item),
            b'6' => self.builder.special(item, EntryKind::Fifo),
            b'D' => {
                let size = self.size(&header, offset, pax.size)?;
                self.skip(size);
                self.builder.directory(item)
            }
            b'S' => {
                let stored = self.size(&header, offset, pax.size)?;
                self.old_sparse(&header, item, stored)
            }
            _ => {
                let stored = self.size(&header, offset, pax.size)?;
                self.regular(item, stored, pax)
            }
        }
    }

    fn pass_over(&mut self, flag: u8, size: u64) {
        // M: rest of a file that began on another volume, V: volume label, N: old long names. These types need no
        // warning.
        if !matches!(flag, b'M' | b'V' | b'N') {
            let name = shown(&self.name);
            self.builder
                .warn(|| format!("entry {name} has the unknown type {flag:#04x} and is left out"));
        }
        self.skip(size);
    }

    fn regular(&mut self, item: Item, stored: u64, pax: Pax) -> Result<(), TocError> {
        let bad = |reason| TocError::BadSparse {
            entry: shown(&item.name),
            offset: item.offset,
            reason,
        };
        const NO_SIZE: &str = "the file's size (GNU.sparse.size or .realsize) is missing";
        if pax.sparse.map_in_data() {
            let size = pax.sparse.size.ok_or(NO_SIZE).map_err(bad)?;
            if stored == 0 {
                return Err(bad("it is missing"));
            }
            self.state = TarState::DataMap(
                Box::new(SparseFile {
                    item,
                    size,
                    stored,
                    map: Vec::new(),
                }),
                MapParser::default(),
            );
            return Ok(());
        }
        let size = match pax.sparse.map {
            Some(_) => pax.sparse.size.ok_or(NO_SIZE).map_err(bad)?,
            None => stored,
        };
        self.begin_content(item, stored, size, pax.sparse.map)
    }

    fn old_sparse(&mut self, header: &TarHeader<'_>, item: Item, stored: u64) -> Result<(), TocError> {
        let bad = |reason| TocError::BadSparse {
            entry: shown(&item.name),
            offset: item.offset,
            reason,
        };
        if !header.is_gnu() {
            return Err(bad("its header is not in GNU format"));
        }
        let (map, more) = header
            .sparse_map()
            .ok_or_else(|| bad("a number in it does not parse"))?;
        let size = self.unsigned(header, item.offset, NumericField::REAL_SIZE)?;
        if more {
            self.state = TarState::OldMap(Box::new(SparseFile {
                item,
                size,
                stored,
                map,
            }));
            return Ok(());
        }
        self.begin_content(item, stored, size, Some(map))
    }

    pub(super) fn continue_old_map(&mut self, mut sparse: Box<SparseFile>, block: &TarBlock) -> Result<(), TocError> {
        let Some(more) = header::sparse_continuation(block, &mut sparse.map) else {
            let Item { name, offset, .. } = sparse.item;
            return Err(TocError::BadSparse {
                entry: shown(&name),
                offset,
                reason: "a number in it does not parse",
            });
        };
        self.builder.check_map(sparse.map.len(), &sparse.item.name)?;
        let limit = self.builder.limits().entries;
        if sparse.map.len() > limit {
            return Err(TocError::TooManyEntries {
                entry: shown(&sparse.item.name),
                limit,
            });
        }
        if more {
            self.state = TarState::OldMap(sparse);
            return Ok(());
        }
        let SparseFile {
            item,
            size,
            stored,
            map,
        } = *sparse;
        self.begin_content(item, stored, size, Some(map))
    }

    pub(super) fn read_map(
        &mut self,
        mut sparse: Box<SparseFile>,
        mut parser: MapParser,
        bytes: &[u8],
    ) -> Result<usize, TocError> {
        let bad = |item: &Item, reason| TocError::BadSparse {
            entry: shown(&item.name),
            offset: item.offset,
            reason,
        };
        let max_pieces = self.builder.limits().entries;
        let taken = parser
            .push(clip(bytes, sparse.stored), max_pieces)
            .map_err(|reason| bad(&sparse.item, reason))?;
        self.builder.check_map(parser.pieces(), &sparse.item.name)?;
        sparse.stored -= taken as u64;
        self.pos += taken as u64;
        if parser.is_complete() {
            let SparseFile { item, size, stored, .. } = *sparse;
            self.begin_content(item, stored, size, Some(parser.into_map()))?;
        } else if sparse.stored == 0 {
            return Err(bad(&sparse.item, "it is longer than the data"));
        } else {
            self.state = TarState::DataMap(sparse, parser);
        }
        Ok(taken)
    }

    /// Begins content of `stored` bytes at the current position.
    fn begin_content(
        &mut self,
        item: Item,
        stored: u64,
        size: u64,
        map: Option<Vec<SparsePiece>>,
    ) -> Result<(), TocError> {
        let extents = self.builder.regular(
            item,
            FileContent {
                tar: self.pos,
                stored,
                size,
                map,
            },
        )?;
        if extents.is_empty() {
            self.skip(stored);
        } else {
            self.state = TarState::Data {
                extents,
                done: 0,
                pad: pad(stored),
            };
        }
        Ok(())
    }

    fn item(&mut self, header: &TarHeader<'_>, offset: u64, flag: u8, pax: &mut Pax) -> Result<Item, TocError> {
        let (mtime, mtime_nsec) = match pax.mtime {
            Some(time) => time,
            None => (self.field(header, offset, NumericField::MTIME)?, 0),
        };
        let mut meta = Metadata {
            mode: (self.field(header, offset, NumericField::MODE)? & 0o7777) as u16,
            uid: self.owner(header, offset, NumericField::UID, pax.uid)?,
            gid: self.owner(header, offset, NumericField::GID, pax.gid)?,
            mtime,
            mtime_nsec,
        };
        let (schily, libarchive) = (
            std::mem::take(&mut pax.xattrs),
            std::mem::take(&mut pax.libarchive_xattrs),
        );
        let holder = match flag {
            b'2' => Holder::Symlink,
            b'3' | b'4' | b'6' => Holder::Special,
            b'5' | b'D' => Holder::Directory,
            _ => Holder::File,
        };
        let raw = [schily, libarchive];
        let xattrs = self.builder.attributes(raw, holder, &mut meta, &self.name);
        Ok(Item {
            offset,
            name: self.name.clone(),
            meta,
            xattrs,
        })
    }

    fn device(&mut self, header: &TarHeader<'_>, offset: u64, flag: u8) -> Result<EntryKind, TocError> {
        let (major, minor) = (
            self.field(header, offset, NumericField::DEV_MAJOR)?,
            self.field(header, offset, NumericField::DEV_MINOR)?,
        );
        let number = self.builder.device_number(major, minor, &self.name);
        Ok(if flag == b'3' {
            EntryKind::CharDevice(number)
        } else {
            EntryKind::BlockDevice(number)
        })
    }

    pub(super) fn size(&self, header: &TarHeader<'_>, offset: u64, pax: Option<u64>) -> Result<u64, TocError> {
        match pax {
            Some(size) => Ok(size),
            None => self.unsigned(header, offset, NumericField::SIZE),
        }
    }

    /// Returns a user or group, from its pax record if there is one.
    fn owner(
        &mut self,
        header: &TarHeader<'_>,
        offset: u64,
        field: NumericField,
        pax: Option<i64>,
    ) -> Result<u32, TocError> {
        let id = match pax {
            Some(id) => id,
            None => self.field(header, offset, field)?,
        };
        Ok(self.builder.owner(id, field.name, &self.name))
    }

    fn unsigned(&self, header: &TarHeader<'_>, offset: u64, field: NumericField) -> Result<u64, TocError> {
        u64::try_from(self.field(header, offset, field)?).map_err(|_| self.bad_field(header, offset, field))
    }

    fn field(&self, header: &TarHeader<'_>, offset: u64, field: NumericField) -> Result<i64, TocError> {
        header
            .number(field)
            .ok_or_else(|| self.bad_field(header, offset, field))
    }

    fn bad_field(&self, header: &TarHeader<'_>, offset: u64, field: NumericField) -> TocError {
        TocError::BadField {
            entry: shown(&self.name),
            offset,
            field: field.name,
            value: shown(header.raw(field)),
        }
    }
}
