//! Finds the members of a tar archive in one walk over the headers that seeks over the content.
//!
//! Names are bytes, cleaned of `.`, `..` and leading slashes. Links are kept, and followed by name within the
//! archive. `..` stops at the top of the archive, and absolute targets begin there.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;

use tar::EntryType;

/// Most members kept. An image of 4096 layers has some 16 thousand in the most talkative format. A larger bound costs
/// memory; a smaller one refuses such images.
const MAX_MEMBERS: usize = 1 << 16;
/// Most bytes that the walk reads: 2 KiB of headers and long names for each member. The bound also limits the memory
/// of the walk. A larger bound costs memory; a smaller one refuses archives with long names.
const MAX_WALK: u64 = (MAX_MEMBERS as u64) << 11;
/// Most links followed for one name, as in the Linux kernel. The bound ends circles.
const MAX_LINKS: usize = 40;
/// Longest name or link target kept (PATH_MAX).
const MAX_NAME: usize = 4096;

/// Content of a file in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Member {
    /// Offset in the archive.
    pub offset: u64,
    /// Bytes of content.
    pub size: u64,
}

#[derive(Debug)]
enum MemberEntry {
    File(Member),
    Symlink(Vec<u8>),
    Hardlink(Vec<u8>),
    /// A file whose content is several ranges of the archive.
    Sparse,
}

/// Why a name leads to no file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FindError {
    #[error("it is not there")]
    Missing,
    #[error("its links lead in a circle")]
    Circle,
    #[error("it is stored as a sparse file: write the archive again without")]
    Sparse,
    #[error("its name is longer than {MAX_NAME} bytes, or becomes so by links")]
    TooLong,
}

/// The members of an archive by name.
#[derive(Debug)]
pub(super) struct Members(HashMap<Vec<u8>, MemberEntry>);

impl Members {
    /// Walks an uncompressed archive and notes its members.
    pub fn of(file: &File) -> io::Result<Self> {
        let mut members = HashMap::new();
        let mut archive = tar::Archive::new(Walk {
            file,
            at: 0,
            left: MAX_WALK,
        });
        for entry in archive.entries_with_seek()? {
            let entry = entry?;
            let link = || entry.link_name_bytes().map(|target| target.into_owned());
            let found = match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => MemberEntry::File(Member {
                    offset: entry.raw_file_position(),
                    size: entry.size(),
                }),
                EntryType::GNUSparse => MemberEntry::Sparse,
                EntryType::Symlink => MemberEntry::Symlink(link().unwrap_or_default()),
                EntryType::Link => MemberEntry::Hardlink(link().unwrap_or_default()),
                _ => continue,
            };
            let name = entry.path_bytes();
            let target_len = match &found {
                MemberEntry::Symlink(target) | MemberEntry::Hardlink(target) => target.len(),
                MemberEntry::File(_) | MemberEntry::Sparse => 0,
            };
            if name.len() > MAX_NAME || target_len > MAX_NAME {
                return Err(io::Error::other(format!(
                    "a member's name is longer than {MAX_NAME} bytes"
                )));
            }
            members.insert(clean(&name), found);
            if members.len() > MAX_MEMBERS {
                return Err(io::Error::other(format!("it has more than {MAX_MEMBERS} members")));
            }
        }
        Ok(Self(members))
    }

    /// Finds the file that a name leads to.
    pub fn find(&self, name: &[u8]) -> Result<Member, FindError> {
        if name.len() > MAX_NAME {
            return Err(FindError::TooLong);
        }
        let mut todo: VecDeque<&[u8]> = name.split(|&b| b == b'/').collect();
        let mut at: Vec<&[u8]> = Vec::new();
        let mut links = 0;
        while let Some(component) = todo.pop_front() {
            step(&mut at, component);
            let path = at.join(&b'/');
            // Each link may add as many bytes again.
            if path.len() > MAX_NAME {
                return Err(FindError::TooLong);
            }
            let (target, from_top) = match self.0.get(&path) {
                Some(MemberEntry::File(member)) if todo.is_empty() => return Ok(*member),
                Some(MemberEntry::Sparse) if todo.is_empty() => return Err(FindError::Sparse),
                Some(MemberEntry::Symlink(target)) => (target, target.starts_with(b"/")),
                Some(MemberEntry::Hardlink(target)) => (target, true),
                _ => continue,
            };
            links += 1;
            if links > MAX_LINKS {
                return Err(FindError::Circle);
            }
            if from_top {
                at.clear();
            } else {
                at.pop();
            }
            for component in target.rsplit(|&b| b == b'/') {
                todo.push_front(component);
            }
        }
        Err(FindError::Missing)
    }
}

/// Follows one path component. Never goes above the top.
fn step<'a>(at: &mut Vec<&'a [u8]>, component: &'a [u8]) {
    match component {
        b"" | b"." => {}
        b".." => {
            at.pop();
        }
        name => at.push(name),
    }
}

fn clean(name: &[u8]) -> Vec<u8> {
    let mut at = Vec::new();
    name.split(|&b| b == b'/')
        .for_each(|component| step(&mut at, component));
    at.join(&b'/')
}

/// Reads an archive's file at a position of its own. The number of bytes is bounded, because an archive may claim
/// names of any length.
struct Walk<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Walk<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(into, self.at)?;
        self.at += got as u64;
        self.left = self.left.checked_sub(got as u64).ok_or_else(|| {
            io::Error::other(format!(
                "its headers and member names are larger than {} MiB",
                MAX_WALK >> 20
            ))
        })?;
        Ok(got)
    }
}

impl Seek for Walk<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::other("a member ends beyond any file"))?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum Made<'a> {
        File(&'a str, &'a [u8]),
        Link(EntryType, &'a str, &'a str),
    }
    use Made::{File as F, Link as L};

    fn members(entries: &[Made]) -> (tempfile::NamedTempFile, io::Result<Members>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut builder = tar::Builder::new(file.as_file());
        for entry in entries {
            let mut header = tar::Header::new_gnu();
            match entry {
                F(name, content) => {
                    header.set_size(content.len() as u64);
                    // Set the raw name, because the safe setter refuses `..`.
                    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
                    header.set_cksum();
                    builder.append(&header, *content).unwrap();
                }
                L(kind, name, target) => {
                    header.set_entry_type(*kind);
                    header.set_size(0);
                    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
                    header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
                    header.set_cksum();
                    builder.append(&header, io::empty()).unwrap();
                }
            }
        }
        builder.finish().unwrap();
        drop(builder);
        let members = Members::of(file.as_file());
        (file, members)
    }

    #[test]
    fn links_are_followed_within_the_archive() {
        let sym = EntryType::Symlink;
        let (file, members) = members(&[
            F("a/layer.tar", b"AAA"),
            L(sym, "b/layer.tar", "../a/layer.tar"),
            L(sym, "c/layer.tar", "../b/layer.tar"),
            L(sym, "d", "a"),
            L(sym, "e/up", "../../../../a/layer.tar"),
            L(sym, "e/abs", "/a/layer.tar"),
            L(EntryType::Link, "f/hard", "a/layer.tar"),
            L(EntryType::Link, "f/hard2", "./b/../c/layer.tar"),
            L(sym, "loop1", "loop2"),
            L(sym, "loop2", "loop1"),
            L(sym, "self", "self/x"),
            L(sym, "gone", "nothing"),
            L(sym, "empty", ""),
            F("./x//y", b"old"),
            F("x/y", b"new"),
            F("../../top", b"top"),
            F("none", b""),
        ]);
        let members = members.unwrap();
        let read = |name: &str| {
            let member = members.find(name.as_bytes())?;
            let mut content = vec![0; member.size as usize];
            file.as_file().read_exact_at(&mut content, member.offset).unwrap();
            Ok(String::from_utf8(content).unwrap())
        };
        for name in [
            "a/layer.tar",
            "/a/./layer.tar",
            "x/../a/layer.tar",
            "../a/layer.tar",
            "b/layer.tar",
            "c/layer.tar",
            "d/layer.tar",
            "e/up",
            "e/abs",
            "f/hard",
            "f/hard2",
        ] {
            assert_eq!(read(name), Ok("AAA".to_owned()), "{name}");
        }
        assert_eq!(read("x/y"), Ok("new".to_owned()), "the last of equals counts");
        assert_eq!(read("top"), Ok("top".to_owned()));
        assert_eq!(read("none"), Ok(String::new()));
        for name in ["loop1", "self"] {
            assert_eq!(read(name), Err(FindError::Circle), "{name}");
        }
        for name in ["", ".", "a", "gone", "empty", "a/layer.tar/x", "nothing"] {
            assert_eq!(read(name), Err(FindError::Missing), "{name}");
        }
    }

    #[test]
    fn names_without_end_are_not_looked_for() {
        let (_file, members) = members(&[F("a", b"A"), L(EntryType::Symlink, "s", "s2/x/x/x/x/x/x/x/x/x")]);
        let members = members.unwrap();
        let dots = |len: usize| "./".repeat(len / 2 - 1) + "/a";
        assert!(members.find(dots(MAX_NAME).as_bytes()).is_ok());
        assert_eq!(members.find(dots(MAX_NAME + 2).as_bytes()), Err(FindError::TooLong));
        let linked = format!("s/{}", "y/".repeat(MAX_NAME / 2 - 1));
        assert_eq!(members.find(linked.as_bytes()), Err(FindError::TooLong));
    }

    #[test]
    fn broken_archives_are_errors() {
        let walk = |content: &[u8]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), content).unwrap();
            Members::of(file.as_file())
        };
        assert!(walk(b"").unwrap().0.is_empty());
        assert!(walk(&[0; 1024]).unwrap().0.is_empty());
        assert!(walk(b"no archive").is_err());
        assert!(walk(&[b'x'; 2048]).is_err());
        let (file, _) = members(&[F("a", b"content"), F("b", b"content")]);
        let mut content = std::fs::read(file.path()).unwrap();
        content[1024 + 3] ^= 1;
        assert!(walk(&content).is_err());
    }

    #[test]
    fn a_name_without_end_is_not_read_into_memory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        std::fs::write(file.path(), header.as_bytes()).unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        let error = Members::of(file.as_file()).unwrap_err().to_string();
        assert!(error.contains("member names are larger than"), "{error}");
    }
}
