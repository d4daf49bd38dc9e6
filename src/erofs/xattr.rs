//! Extended attributes of inodes.
//!
//! Behind an inode lie a 12-byte header, the numbers of attributes that the inode shares with others, then attributes
//! of its own. An attribute is {name length, prefix number, value size, name, value}, padded to 4 bytes.
//!
//! Shared attributes lie together in an area of their own. The number of a shared attribute is its offset in the area
//! divided by 4.

use crate::erofs::ErofsError;
use crate::erofs::format::{AttributeKinds, XATTR_HEADER, u16_at};
use crate::toc::AttributeId;
use crate::tree::{NodeId, Tree};

/// Namespaces: the number that stands for each, its prefix, and whether more of the name must follow. The two ACL
/// names are complete.
const PREFIXES: [(u8, &[u8], bool); 5] = [
    (1, b"user.", true),
    (2, b"system.posix_acl_access", false),
    (3, b"system.posix_acl_default", false),
    (4, b"trusted.", true),
    (6, b"security.", true),
];

/// Longest name in bytes that Linux accepts (`XATTR_NAME_MAX`).
const MAX_NAME: usize = 255;
/// Most bytes that the attributes of one inode may take. The 16-bit count in the inode can express 12 + 4 x 65534.
const MAX_SIZE: u64 = 262_148;

/// Returns prefix number and rest of the name; `None` if EROFS cannot store the attribute.
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

/// Returns what a reader wants to know about a node's attributes in advance. At least one of them can be stored.
pub(super) fn attributes(tree: &Tree, node: NodeId) -> AttributeKinds {
    let is_list = |id: &AttributeId| tree.attributes().get(*id).0.starts_with(b"system.posix_acl_");
    if tree.xattrs(node).iter().any(is_list) {
        AttributeKinds::AccessControl
    } else {
        AttributeKinds::Plain
    }
}

/// Smallest size of a shared attribute in bytes. Reading a shared attribute costs the kernel one block more, so
/// sharing small ones does not pay.
const SHARED_MIN: u64 = 64;
/// Most attributes that one inode can share; the header counts them in one byte.
const SHARED_MAX: usize = 255;
/// Stands for "not shared" in the place of a shared attribute's number.
const OWN: u32 = u32::MAX;

/// The shared attributes of a tree, and their places.
#[derive(Debug)]
pub(super) struct SharedAttributes {
    /// Number of each attribute in the shared area, or [`OWN`].
    numbers: Vec<u32>,
    /// Size of the area in bytes.
    pub bytes: u64,
}

impl SharedAttributes {
    /// Chooses which attributes to share: the large ones that more than one inode has.
    pub fn of(tree: &Tree) -> Self {
        let mut numbers = vec![OWN; tree.attributes().len()];
        let mut bytes = 0;
        if numbers.is_empty() {
            return Self { numbers, bytes };
        }
        let mut seen = vec![false; numbers.len()];
        for node in 0..tree.len() as u32 {
            for id in tree.xattrs(NodeId(node)) {
                let at = *id as usize;
                if !std::mem::replace(&mut seen[at], true) || numbers[at] != OWN {
                    continue;
                }
                let (name, value) = tree.attributes().get(*id);
                let size = storable(name, value).map_or(0, |(_, rest)| entry_size(rest, value));
                // The area ends before the first number that would be `OWN`.
                if size >= SHARED_MIN && bytes / 4 + size / 4 < u64::from(OWN) {
                    numbers[at] = (bytes / 4) as u32;
                    bytes += size;
                }
            }
        }
        Self { numbers, bytes }
    }

    /// Splits the attributes of a node: numbers of the shared ones, ids of those that the inode stores itself, and
    /// all ids. Attributes that EROFS cannot store are only in the last list.
    fn split<'a>(&self, tree: &'a Tree, node: NodeId) -> (Vec<u32>, Vec<AttributeId>, &'a [AttributeId]) {
        let all = tree.xattrs(node);
        let (mut shared, mut own) = (Vec::new(), Vec::new());
        for id in all {
            let number = self.numbers[*id as usize];
            if number != OWN && shared.len() < SHARED_MAX {
                shared.push(number);
                continue;
            }
            let (name, value) = tree.attributes().get(*id);
            if storable(name, value).is_some() {
                own.push(*id);
            }
        }
        (shared, own, all)
    }

    /// Returns the bytes that the attributes of a node take behind its inode, and how many attributes are left out.
    /// Left out are attributes with a namespace that neither EROFS nor setxattr(2) knows, or with a size that EROFS
    /// or Linux does not take. The error is the size and the limit.
    pub fn measure(&self, tree: &Tree, node: NodeId) -> Result<(u32, u64), (u64, u64)> {
        if tree.xattrs(node).is_empty() {
            return Ok((0, 0));
        }
        let (shared, own, all) = self.split(tree, node);
        let mut size = 4 * shared.len() as u64;
        for id in &own {
            let (name, value) = tree.attributes().get(*id);
            size += storable(name, value).map_or(0, |(_, rest)| entry_size(rest, value));
        }
        if size > 0 {
            size += u64::from(XATTR_HEADER);
        }
        if size > MAX_SIZE {
            return Err((size, MAX_SIZE));
        }
        Ok((size as u32, (all.len() - shared.len() - own.len()) as u64))
    }

    /// Appends the attributes of a node as they are stored behind its inode.
    pub fn encode(&self, tree: &Tree, node: NodeId, out: &mut Vec<u8>) {
        if tree.xattrs(node).is_empty() {
            return;
        }
        let (shared, own, _) = self.split(tree, node);
        if shared.is_empty() && own.is_empty() {
            return;
        }
        let mut header = [0; XATTR_HEADER as usize];
        header[4] = shared.len() as u8;
        out.extend_from_slice(&header);
        for number in shared {
            out.extend_from_slice(&number.to_le_bytes());
        }
        own.iter().for_each(|id| encode(tree, *id, out));
    }

    /// Returns the ids of the shared attributes in the order in which the area stores them.
    pub fn area(&self) -> impl Iterator<Item = AttributeId> {
        let mut order: Vec<_> = (0..).zip(&self.numbers).filter(|(_, number)| **number != OWN).collect();
        order.sort_unstable_by_key(|(_, number)| **number);
        order.into_iter().map(|(id, _)| id)
    }
}

/// Appends an attribute as stored. Appends nothing if EROFS cannot store it.
pub(super) fn encode(tree: &Tree, id: AttributeId, out: &mut Vec<u8>) {
    let (name, value) = tree.attributes().get(id);
    if let Some((number, rest)) = storable(name, value) {
        out.push(rest.len() as u8);
        out.push(number);
        out.extend_from_slice(&(value.len() as u16).to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

/// One extended attribute of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xattr<'a> {
    /// Namespace with its dot, or a complete name. The name continues in `rest`.
    pub prefix: &'static [u8],
    /// What follows the prefix; may be empty.
    pub rest: &'a [u8],
    /// The value.
    pub value: &'a [u8],
}

impl Xattr<'_> {
    /// Whether the attribute has the name `name`.
    pub fn is_named(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix) == Some(self.rest)
    }

    /// Returns the whole name.
    pub fn name(&self) -> Vec<u8> {
        [self.prefix, self.rest].concat()
    }
}

/// Iterates over the extended attributes of one inode in stored order. Ends after the first error.
#[derive(Debug, Clone)]
pub struct XattrIter<'a> {
    nid: u64,
    /// Numbers of the shared attributes that are not yet read.
    shared: &'a [u8],
    /// The area of shared attributes, and what follows it.
    area: &'a [u8],
    /// The inode's own attributes that are not yet read.
    rest: &'a [u8],
}

impl<'a> XattrIter<'a> {
    /// Makes an iterator. `behind` is what lies behind the inode: nothing, or a header and the attributes that it
    /// describes. `area` begins with the shared attributes.
    pub(super) fn new(nid: u64, behind: &'a [u8], area: &'a [u8]) -> Result<Self, ErofsError> {
        let corrupt = |what| ErofsError::Corrupt { nid, what };
        let (mut shared, mut rest) = (behind, behind);
        if !behind.is_empty() {
            let body = behind.get(XATTR_HEADER as usize..).ok_or(corrupt("attribute header"))?;
            (shared, rest) = body
                .split_at_checked(4 * usize::from(behind[4]))
                .ok_or(corrupt("shared attributes"))?;
        }
        Ok(Self {
            nid,
            shared,
            area,
            rest,
        })
    }

    /// Reads the next attribute and advances. Returns `None` if the bytes are no attribute.
    fn read(&mut self) -> Option<Xattr<'a>> {
        if let Some((number, others)) = self.shared.split_first_chunk() {
            let at = usize::try_from(u32::from_le_bytes(*number)).ok()?.checked_mul(4)?;
            self.shared = others;
            return parse(self.area.get(at..)?).map(|(xattr, _)| xattr);
        }
        let (xattr, size) = parse(self.rest)?;
        self.rest = self.rest.get(size..)?;
        Some(xattr)
    }
}

/// Returns the attribute at the start of `bytes`, and its size.
fn parse(bytes: &[u8]) -> Option<(Xattr<'_>, usize)> {
    let (name_len, number) = (usize::from(*bytes.first()?), *bytes.get(1)?);
    let value_len = usize::from(u16_at(bytes, 2)?);
    let (_, prefix, _) = PREFIXES.iter().find(|(have, _, _)| *have == number)?;
    let body = bytes.get(4..)?;
    let xattr = Xattr {
        prefix,
        rest: body.get(..name_len)?,
        value: body.get(name_len..name_len + value_len)?,
    };
    Some((xattr, (4 + name_len + value_len).next_multiple_of(4)))
}

impl<'a> Iterator for XattrIter<'a> {
    type Item = Result<Xattr<'a>, ErofsError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.shared.is_empty() && self.rest.is_empty() {
            return None;
        }
        let read = self.read();
        if read.is_none() {
            (self.shared, self.rest) = (&[], &[]);
        }
        Some(read.ok_or(ErofsError::Corrupt {
            nid: self.nid,
            what: "extended attributes",
        }))
    }
}
