//! Extended attributes behind an inode: a 12-byte header, then entries {name length, prefix number, value size, name, value}
//! padded to 4 bytes. Attributes shared between inodes are not used.

use crate::erofs::ErofsError;
use crate::erofs::format::{XATTR_HEADER, u16_at};
use crate::toc::Xattrs;

/// Namespaces by the number that stands for them. The two ACL names are complete, the others want something behind.
const PREFIXES: [(u8, &[u8], bool); 5] = [
    (1, b"user.", true),
    (2, b"system.posix_acl_access", false),
    (3, b"system.posix_acl_default", false),
    (4, b"trusted.", true),
    (6, b"security.", true),
];

/// Longest name Linux takes (`XATTR_NAME_MAX`).
const MAX_NAME: usize = 255;
/// What the 16-bit count in an inode can say: 12 + 4 x 65534.
const MAX_SIZE: u64 = 262_148;

/// Prefix number and rest of an attribute that EROFS can store.
fn storable<'a>(name: &'a [u8], value: &[u8]) -> Option<(u8, &'a [u8])> {
    if name.len() > MAX_NAME || value.len() > usize::from(u16::MAX) {
        return None;
    }
    PREFIXES.iter().find_map(|(number, prefix, more)| {
        let rest = name.strip_prefix(*prefix)?;
        (*more != rest.is_empty()).then_some((*number, rest))
    })
}

fn entry_size(rest: &[u8], value: &[u8]) -> u64 {
    (4 + rest.len() as u64 + value.len() as u64).next_multiple_of(4)
}

/// Bytes the attributes take behind an inode, and how many are left out: those of namespaces neither EROFS nor setxattr(2)
/// knows, and of sizes Linux does not take. The error is the size and the limit.
pub(super) fn measure(xattrs: &Xattrs) -> Result<(u32, u64), (u64, u64)> {
    let mut size = 0;
    let mut dropped = 0;
    for (name, value) in xattrs {
        match storable(name, value) {
            Some((_, rest)) => size += entry_size(rest, value),
            None => dropped += 1,
        }
    }
    if size > 0 {
        size += u64::from(XATTR_HEADER);
    }
    if size > MAX_SIZE {
        return Err((size, MAX_SIZE));
    }
    Ok((size as u32, dropped))
}

/// Appends the attributes as stored.
pub(super) fn encode(xattrs: &Xattrs, out: &mut Vec<u8>) {
    let start = out.len();
    for (name, value) in xattrs {
        let Some((number, rest)) = storable(name, value) else {
            continue;
        };
        if out.len() == start {
            out.extend_from_slice(&[0; XATTR_HEADER as usize]);
        }
        out.push(rest.len() as u8);
        out.push(number);
        out.extend_from_slice(&(value.len() as u16).to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

/// One extended attribute of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xattr<'a> {
    /// Namespace with its dot, or a complete name; the name goes on in `rest`.
    pub prefix: &'static [u8],
    /// What follows the prefix; may be empty.
    pub rest: &'a [u8],
    /// The value.
    pub value: &'a [u8],
}

impl Xattr<'_> {
    /// Whether this is the attribute called `name`.
    pub fn is_named(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix) == Some(self.rest)
    }

    /// The whole name.
    pub fn name(&self) -> Vec<u8> {
        [self.prefix, self.rest].concat()
    }
}

/// Extended attributes of one inode, in stored order; ends after the first error.
#[derive(Debug, Clone)]
pub struct XattrIter<'a> {
    nid: u64,
    /// Entries not yet read.
    rest: &'a [u8],
}

impl<'a> XattrIter<'a> {
    /// `area` is what lies behind the inode: nothing, or a header and entries.
    pub(super) fn new(nid: u64, area: &'a [u8]) -> Result<Self, ErofsError> {
        let corrupt = |what| ErofsError::Corrupt { nid, what };
        if area.is_empty() {
            return Ok(Self { nid, rest: area });
        }
        if area.get(4) != Some(&0) {
            return Err(corrupt("shared attributes"));
        }
        let rest = area.get(XATTR_HEADER as usize..).ok_or(corrupt("attribute header"))?;
        Ok(Self { nid, rest })
    }

    fn read(&self) -> Option<(Xattr<'a>, &'a [u8])> {
        let (name_len, number) = (usize::from(*self.rest.first()?), *self.rest.get(1)?);
        let value_len = usize::from(u16_at(self.rest, 2)?);
        let (_, prefix, _) = PREFIXES.iter().find(|(have, _, _)| *have == number)?;
        let body = self.rest.get(4..)?;
        let name = body.get(..name_len)?;
        let value = body.get(name_len..name_len + value_len)?;
        let rest = self.rest.get((4 + name_len + value_len).next_multiple_of(4)..)?;
        let xattr = Xattr {
            prefix,
            rest: name,
            value,
        };
        Some((xattr, rest))
    }
}

impl<'a> Iterator for XattrIter<'a> {
    type Item = Result<Xattr<'a>, ErofsError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        match self.read() {
            Some((xattr, rest)) => {
                self.rest = rest;
                Some(Ok(xattr))
            }
            None => {
                self.rest = &[];
                Some(Err(ErofsError::Corrupt {
                    nid: self.nid,
                    what: "attribute entry",
                }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_linux_would_refuse_is_left_out() {
        let xattrs: Xattrs = [
            (&b"user.a"[..], &b"1"[..]),
            (b"user.", b"no name"),
            (b"system.posix_acl_access", b"acl"),
            (b"system.posix_acl_access2", b"no"),
            (b"osx.x", b"no such namespace"),
            (b"security.capability", b""),
            (b"user.large", &[0; 65536]),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .to_vec();
        let (size, dropped) = measure(&xattrs).unwrap();
        let mut area = Vec::new();
        encode(&xattrs, &mut area);
        assert_eq!((area.len() as u32, dropped), (size, 4));
        let names: Vec<_> = XattrIter::new(1, &area).unwrap().map(|x| x.unwrap().name()).collect();
        assert_eq!(
            names,
            [&b"user.a"[..], b"system.posix_acl_access", b"security.capability"]
        );
    }

    #[test]
    fn more_than_an_inode_counts_is_an_error() {
        let xattrs: Xattrs = (0..5)
            .map(|i| (format!("user.{i}").into_bytes().into(), vec![0; 65535].into()))
            .collect();
        assert!(matches!(measure(&xattrs), Err((_, MAX_SIZE))));
        assert_eq!(measure(&Vec::new()).unwrap(), (0, 0));
    }
}
