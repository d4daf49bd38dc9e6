//! One 512-byte tar header block: v7, ustar, GNU and star layouts.
//!
//! ```text
//!   0 name[100]  100 mode[8]  108 uid[8]  116 gid[8]  124 size[12]  136 mtime[12]  148 checksum[8]
//! 156 type  157 linkname[100]  257 magic[6] version[2]  265 uname[32]  297 gname[32]  329 devmajor[8]  337 devminor[8]
//! ustar: 345 prefix[155]            star: 345 prefix[131] 476 atime[12] 488 ctime[12] 508 "tar\0"
//! GNU:   345 atime[12] 357 ctime[12] 386 sparse map[4 x 24] 482 isextended 483 realsize[12]
//! ```

use std::ops::Range;

use super::BLOCK;
use super::sparse::{SparsePiece, push_fragment};

/// One block of a tar.
pub(super) type TarBlock = [u8; BLOCK];

/// A numeric header field, with its name in messages.
#[derive(Debug, Clone, Copy)]
pub(super) struct NumericField {
    pub name: &'static str,
    at: (usize, usize),
}

impl NumericField {
    const fn new(name: &'static str, offset: usize, len: usize) -> Self {
        Self {
            name,
            at: (offset, offset + len),
        }
    }

    pub const MODE: Self = Self::new("mode", 100, 8);
    pub const UID: Self = Self::new("uid", 108, 8);
    pub const GID: Self = Self::new("gid", 116, 8);
    pub const SIZE: Self = Self::new("size", 124, 12);
    pub const MTIME: Self = Self::new("mtime", 136, 12);
    pub const DEV_MAJOR: Self = Self::new("devmajor", 329, 8);
    pub const DEV_MINOR: Self = Self::new("devminor", 337, 8);
    pub const REAL_SIZE: Self = Self::new("realsize", 483, 12);
}

/// A header block with a valid checksum.
#[derive(Debug, Clone, Copy)]
pub(super) struct TarHeader<'a>(&'a TarBlock);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl<'a> TarHeader<'a> {
    /// Returns the block as a header if its checksum is valid. Old writers summed signed bytes, so both the signed
    /// and the unsigned sum are valid.
    pub fn new(block: &'a TarBlock) -> Option<Self> {
        const CHECKSUM: Range<usize> = 148..156;
        let stored = number(&block[CHECKSUM])?;
        // The checksum field itself counts as spaces. Summing the whole block lets the compiler vectorise the loop.
        let sum = |bytes: &[u8]| bytes.iter().map(|&b| i32::from(b)).sum::<i32>();
        let unsigned = sum(block) - sum(&block[CHECKSUM]) + CHECKSUM.len() as i32 * i32::from(b' ');
        let is_sum = |sum: i32| i64::from(sum) == stored;
        let signed = || {
            let negative = |bytes: &[u8]| bytes.iter().filter(|&&b| b >= 0x80).count() as i32;
            unsigned - 256 * (negative(block) - negative(&block[CHECKSUM]))
        };
        (is_sum(unsigned) || is_sum(signed())).then_some(Self(block))
    }

    fn flavour(&self) -> Flavour {
        match (&self.0[257..265], &self.0[508..]) {
            (b"ustar  \0", _) => Flavour::Gnu,
            ([b'u', b's', b't', b'a', b'r', 0, ..], b"tar\0") => Flavour::Star,
            ([b'u', b's', b't', b'a', b'r', 0, ..], _) => Flavour::Ustar,
            _ => Flavour::V7,
        }
    }

    pub fn is_gnu(&self) -> bool {
        self.flavour() == Flavour::Gnu
    }

    pub fn type_flag(&self) -> u8 {
        self.0[156]
    }

    /// Returns the bytes of a field, for messages.
    pub fn raw(&self, field: NumericField) -> &'a [u8] {
        &self.0[field.at.0..field.at.1]
    }

    /// Returns the value of a field, 0 for an empty one; `None` if it does not parse.
    pub fn number(&self, field: NumericField) -> Option<i64> {
        number(self.raw(field))
    }

    /// Returns the link target, up to the first NUL.
    pub fn link(&self) -> &'a [u8] {
        text(&self.0[157..257])
    }

    /// Returns the name, with the prefix if this flavour of header has a prefix field.
    pub fn name(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match self.flavour() {
            Flavour::Ustar => text(&self.0[345..500]),
            Flavour::Star => text(&self.0[345..476]),
            Flavour::Gnu => self.misplaced_prefix(),
            Flavour::V7 => b"",
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    /// Returns the prefix that Go before 1.8 wrote in the ustar way under the GNU magic. The GNU layout has the times
    /// of access and change in its place.
    fn misplaced_prefix(&self) -> &'a [u8] {
        if self.type_flag() == b'S' || number(&self.0[345..357]).and(number(&self.0[357..369])).is_some() {
            return b"";
        }
        let prefix = text(&self.0[345..500]);
        if prefix.is_ascii() { prefix } else { b"" }
    }

    /// Returns the first pairs of an old GNU sparse map, and whether blocks with more pairs follow. `None` if a
    /// number does not parse.
    pub fn sparse_map(&self) -> Option<(Vec<SparsePiece>, bool)> {
        let mut map = Vec::new();
        sparse_pairs(&self.0[386..482], &mut map)?;
        Some((map, self.0[482] != 0))
    }
}

/// Adds the pairs of a continuation block of an old GNU sparse map. Returns whether another block follows; `None` if
/// a number does not parse.
pub(super) fn sparse_continuation(block: &TarBlock, map: &mut Vec<SparsePiece>) -> Option<bool> {
    sparse_pairs(&block[..504], map)?;
    Some(block[504] != 0)
}

fn sparse_pairs(bytes: &[u8], map: &mut Vec<SparsePiece>) -> Option<()> {
    for pair in bytes.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        let offset = u64::try_from(number(&pair[..12])?).ok()?;
        let len = u64::try_from(number(&pair[12..])?).ok()?;
        push_fragment(map, SparsePiece { offset, len });
    }
    Some(())
}

/// Returns a field up to its first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}

/// Parses octal digits between optional blanks and NULs. If the first bit is set, the field is a big-endian two's
/// complement number.
fn number(field: &[u8]) -> Option<i64> {
    match field {
        [first, ..] if first & 0x80 != 0 => base256(*first, &field[1..]),
        _ => octal(field),
    }
}

fn base256(first: u8, rest: &[u8]) -> Option<i64> {
    // The first bit is the marker, so the second bit is the sign: shift the sign to the top and back.
    let first = i64::from((first << 1) as i8 >> 1);
    rest.iter().try_fold(first, |value, &byte| {
        value.checked_mul(256)?.checked_add(i64::from(byte))
    })
}

fn octal(field: &[u8]) -> Option<i64> {
    let blank = |b: &u8| matches!(b, b' ' | 0);
    let start = field.iter().position(|b| !blank(b)).unwrap_or(field.len());
    let digits = field[start..].split(blank).next().unwrap_or_default();
    digits.iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (field, value) in [
            (&b""[..], Some(0)),
            (b"\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"0000644\0", Some(0o644)),
            (b"  644 \0\0", Some(0o644)),
            (b"\0 17\0", Some(0o17)),
            (b"77777777", Some(0o77777777)),
            (b"644\0junk", Some(0o644)),
            (b"644 junk", Some(0o644)),
            (b"0x10", None),
            (b"89", None),
            (b"-1", None),
            (b"777777777777777777777777", None),
            (b"\x80\0\0\0\0\0\0\x01", Some(1)),
            (b"\x80\0\0\0\xff\xff\xff\xff", Some(0xffff_ffff)),
            (b"\xbf\xff", Some(0x3fff)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
            (b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xc0\0\0\0\0\0\0\0\0\0\0\0", None),
            (b"\xc0", Some(-64)),
        ] {
            assert_eq!(number(field), value, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn either_checksum_is_right() {
        let mut block = [0; BLOCK];
        block[0] = 0xff;
        for (sum, right) in [(256 + 255, true), (256 - 1, true), (256, false)] {
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            assert_eq!(TarHeader::new(&block).is_some(), right, "{sum}");
        }
        assert!(TarHeader::new(&[0; BLOCK]).is_none());
    }

    #[test]
    fn prefixes() {
        let name = |magic: &[u8], set: &[(usize, &[u8])]| {
            let mut block = [0; BLOCK];
            block[..4].copy_from_slice(b"name");
            block[257..257 + magic.len()].copy_from_slice(magic);
            for (at, bytes) in set {
                block[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            String::from_utf8(TarHeader(&block).name()).unwrap()
        };
        let long = [b'p'; 155];
        assert_eq!(name(b"ustar\x0000", &[(345, b"some/dir")]), "some/dir/name");
        assert_eq!(name(b"ustar\x0000", &[(345, &long)]).len(), 155 + 5);
        assert_eq!(name(b"ustar\x0000", &[(345, &long), (508, b"tar\0")]).len(), 131 + 5);
        assert_eq!(name(b"", &[(345, b"some/dir")]), "name");
        assert_eq!(name(b"ustar  \0", &[(345, b"some/dir")]), "some/dir/name");
        assert_eq!(name(b"ustar  \0", &[(345, b"13371337133\x0013371337133\0")]), "name");
        assert_eq!(name(b"ustar  \0", &[(156, b"S"), (345, b"some/dir")]), "name");
    }
}
