//! What a program file needs: its interpreter, its libraries, and which of its own bytes are read at every start.
//!
//! The module understands ELF files (System V gABI, chapters 4 and 5) and scripts (`#!`, execve(2)). The module reads
//! only what the loader itself would look at, a few kilobytes.
//!
//! Files come from images, so every number in them may be wrong. All reads are bounded, and values that make no sense
//! are ignored. The results are guesses about what will be read.

use std::ops::Range;

use elf::abi;
use elf::dynamic::DynamicTable;
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::segment::{ProgramHeader, SegmentTable};
use serde::{Deserialize, Serialize};

/// Largest ELF file header, and largest program header, in bytes.
const HEADER: usize = 64;
/// Longest name or search path in bytes.
const LONGEST_NAME: u64 = 256;
/// Longest first line of a script in bytes.
const LONGEST_LINE: usize = 128;
/// Most program headers. Real files have about ten.
const MOST_SEGMENTS: u16 = 64;
/// Longest dynamic section in bytes: 1024 entries of a 64-bit file. Real files have about thirty entries.
const MOST_DYNAMIC: u64 = 16 << 10;
/// Most libraries. Real files have up to a hundred.
const MOST_LIBRARIES: usize = 256;
/// Most directories of a program's own search path. Real files have one or two.
const MOST_PLACES: usize = 16;
/// Largest file of which practically all bytes are read when it is loaded. Of a larger file the loader reads the
/// tables at its beginning and the data that it relocates.
const SMALL: u64 = 8 << 20;
/// Most bytes of the tables of a large file.
const MOST_TABLES: u64 = 1 << 20;
/// Most bytes of each data segment of a large file.
const MOST_DATA: u64 = 2 << 20;

/// What a program or library needs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Program {
    /// Path of the program's loader. For a script: path of the program that runs it.
    pub interpreter: Option<String>,
    /// The first word behind a script's interpreter.
    pub argument: Option<String>,
    /// Names of the libraries that the loader looks for. A name with a slash is a path.
    pub libraries: Vec<String>,
    /// Directories in which the loader looks first. `$ORIGIN` stands for the file's own directory.
    pub search: Vec<String>,
    /// Byte ranges of the file that are read at every start.
    pub hot: Vec<Range<u64>>,
}

/// Reads a part of a file: fills the buffer from an offset, or returns false if it cannot.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> bool + 'a;

impl Program {
    /// Returns roughly how many bytes of memory the program takes.
    pub fn size(&self) -> usize {
        let names = self.libraries.iter().chain(&self.search);
        let names = names.chain(&self.interpreter).chain(&self.argument);
        size_of::<Self>() + names.map(|name| size_of::<String>() + name.len()).sum::<usize>() + 16 * self.hot.len()
    }

    /// Looks into a file of `size` bytes; `None` if it is no program.
    pub fn look(size: u64, read: &mut ReadAt<'_>) -> Option<Self> {
        let mut start = vec![0; size.min(LONGEST_LINE as u64) as usize];
        if !read(0, &mut start) {
            return None;
        }
        if start.starts_with(b"#!") {
            return Some(Self::script(size, &start[2..]));
        }
        if !start.starts_with(&abi::ELFMAGIC) {
            return None;
        }
        Elf::open(size, &start, read)?.program()
    }

    fn script(size: u64, line: &[u8]) -> Self {
        let line = line.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let mut words = line.split_ascii_whitespace().map(str::to_owned);
        Self {
            interpreter: words.next(),
            argument: words.next(),
            hot: std::iter::once(0..size.min(SMALL)).collect(),
            ..Self::default()
        }
    }
}

struct Elf<'a, 'r> {
    size: u64,
    endian: AnyEndian,
    class: Class,
    segments: Vec<ProgramHeader>,
    read: &'a mut ReadAt<'r>,
}

impl<'a, 'r> Elf<'a, 'r> {
    fn open(size: u64, start: &[u8], read: &'a mut ReadAt<'r>) -> Option<Self> {
        let ident = parse_ident::<AnyEndian>(start.get(..abi::EI_NIDENT)?).ok()?;
        let header = FileHeader::parse_tail(ident, start.get(abi::EI_NIDENT..HEADER.min(start.len()))?).ok()?;
        let count = header.e_phnum.min(MOST_SEGMENTS);
        let mut table = vec![0; usize::from(header.e_phentsize.min(HEADER as u16)) * usize::from(count)];
        if !read(header.e_phoff, &mut table) {
            return None;
        }
        let segments = SegmentTable::new(header.endianness, header.class, &table);
        Some(Self {
            size,
            endian: header.endianness,
            class: header.class,
            segments: segments.iter().collect(),
            read,
        })
    }

    fn segment(&self, kind: u32) -> Option<&ProgramHeader> {
        self.segments.iter().find(|segment| segment.p_type == kind)
    }

    fn program(mut self) -> Option<Program> {
        let interpreter = self.segment(abi::PT_INTERP).map(|s| s.p_offset);
        let mut program = Program {
            interpreter: interpreter.and_then(|offset| self.name(offset)),
            hot: self.hot(),
            ..Program::default()
        };
        self.dynamic(&mut program);
        Some(program)
    }

    fn hot(&self) -> Vec<Range<u64>> {
        if self.size <= SMALL {
            return std::iter::once(0..self.size).collect();
        }
        let loaded = self.segments.iter().filter(|segment| segment.p_type == abi::PT_LOAD);
        let range = |segment: &ProgramHeader, most: u64| {
            let end = segment.p_offset.saturating_add(segment.p_filesz.min(most));
            segment.p_offset.min(self.size)..end.min(self.size)
        };
        let hot = loaded.filter_map(|segment| match segment.p_flags & abi::PF_W {
            0 if segment.p_offset == 0 => Some(range(segment, MOST_TABLES)),
            0 => None,
            _ => Some(range(segment, MOST_DATA)),
        });
        hot.filter(|range| !range.is_empty()).collect()
    }

    /// Reads the libraries and their search path (gABI, chapter 5, "Dynamic Section").
    fn dynamic(&mut self, program: &mut Program) -> Option<()> {
        let segment = self.segment(abi::PT_DYNAMIC)?;
        let (offset, length) = (segment.p_offset, segment.p_filesz.min(MOST_DYNAMIC));
        let mut table = vec![0; length as usize];
        if !(self.read)(offset, &mut table) {
            return None;
        }
        let entries = DynamicTable::new(self.endian, self.class, &table);
        let entries: Vec<_> = entries.iter().take_while(|entry| entry.d_tag != abi::DT_NULL).collect();
        let strings = entries.iter().find(|entry| entry.d_tag == abi::DT_STRTAB)?;
        let strings = self.offset_of(strings.d_ptr())?;
        for entry in &entries {
            let name = |elf: &mut Self| elf.name(strings.checked_add(entry.d_val())?);
            match entry.d_tag {
                abi::DT_NEEDED if program.libraries.len() < MOST_LIBRARIES => program.libraries.extend(name(self)),
                abi::DT_RUNPATH | abi::DT_RPATH => {
                    let path = name(self).unwrap_or_default();
                    let places = path.split(':').filter(|place| !place.is_empty());
                    let room = MOST_PLACES - program.search.len();
                    program.search.extend(places.take(room).map(str::to_owned));
                }
                _ => {}
            }
        }
        Some(())
    }

    /// Returns the file offset of a virtual address.
    fn offset_of(&self, address: u64) -> Option<u64> {
        let holds = |segment: &&ProgramHeader| {
            segment.p_type == abi::PT_LOAD
                && address
                    .checked_sub(segment.p_vaddr)
                    .is_some_and(|at| at < segment.p_filesz)
        };
        let segment = self.segments.iter().find(holds)?;
        segment.p_offset.checked_add(address - segment.p_vaddr)
    }

    /// Reads the text at a file offset, up to its NUL.
    fn name(&mut self, offset: u64) -> Option<String> {
        let length = self.size.checked_sub(offset)?.min(LONGEST_NAME);
        let mut bytes = vec![0; length as usize];
        if !(self.read)(offset, &mut bytes) {
            return None;
        }
        let end = bytes.iter().position(|&byte| byte == 0)?;
        bytes.truncate(end);
        String::from_utf8(bytes).ok().filter(|name| !name.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use proptest::prelude::*;

    use super::*;

    fn look(bytes: &[u8]) -> Option<Program> {
        let mut read = |offset: u64, buf: &mut [u8]| {
            let part = usize::try_from(offset)
                .ok()
                .and_then(|at| bytes.get(at..at.checked_add(buf.len())?));
            part.map(|part| buf.copy_from_slice(part)).is_some()
        };
        Program::look(bytes.len() as u64, &mut read)
    }

    #[test]
    fn a_real_program_names_what_the_loader_loads() {
        let file = std::fs::File::open("/bin/sh").unwrap();
        let size = file.metadata().unwrap().len();
        let mut asked = 0;
        let mut read = |offset: u64, buf: &mut [u8]| {
            asked += buf.len();
            file.read_exact_at(buf, offset).is_ok()
        };
        let program = Program::look(size, &mut read).unwrap();
        assert!(asked < 16_000, "{asked}");
        let listed = std::process::Command::new("ldd").arg("/bin/sh").output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert!(!program.libraries.is_empty());
        for library in &program.libraries {
            assert!(listed.contains(library.as_str()), "{library} is not in {listed}");
        }
        let interpreter = program.interpreter.unwrap();
        assert!(listed.contains(&interpreter), "{interpreter} is not in {listed}");
        assert!(program.hot.iter().all(|range| range.end <= size) && !program.hot.is_empty());
    }

    #[test]
    fn scripts_name_their_interpreter() {
        let script = look(b"#! /usr/bin/env  python3 -u\nprint()\n").unwrap();
        assert_eq!(script.interpreter.as_deref(), Some("/usr/bin/env"));
        assert_eq!(script.argument.as_deref(), Some("python3"));
        assert_eq!(look(b"#!").unwrap().interpreter, None);
        assert_eq!(look(b"hello"), None);
        assert_eq!(look(b""), None);
    }

    proptest! {
        #[test]
        fn damaged_programs_are_read_within_bounds(flips in prop::collection::vec((0usize..4096, any::<u8>()), 0..12), cut in 0usize..200_000) {
            let mut bytes = std::fs::read("/bin/sh").unwrap();
            for (at, value) in flips {
                bytes[at] = value;
            }
            bytes.truncate(cut.max(64));
            if let Some(program) = look(&bytes) {
                prop_assert!(program.libraries.len() <= MOST_LIBRARIES && program.search.len() <= MOST_PLACES);
                prop_assert!(program.hot.iter().all(|range| range.end <= bytes.len() as u64));
            }
        }
    }
}
