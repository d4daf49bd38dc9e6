//! Extended attributes. Behind an inode: a 12-byte header, numbers of attributes that it shares with other inodes, then
//! attributes of its own. An attribute is {name length, prefix number, value size, name, value}, padded to 4 bytes.
//!
//! Shared attributes stand together in an area of their own; their numbers are their offsets in it, divided by 4.

use crate::erofs::ErofsError;
use crate::erofs::format::{Attributes, XATTR_HEADER, u16_at};
use crate::toc::AttributeId;
use crate::tree::{NodeId, Tree};

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

/// Which of a node's attributes a reader wants to know of beforehand; at least one can be stored.
pub(super) fn attributes(tree: &Tree, node: NodeId) -> Attributes {
    let is_list = |id: &AttributeId| tree.attributes().get(*id).0.starts_with(b"system.posix_acl_");
    if tree.xattrs(node).iter().any(is_list) {
        Attributes::AccessControl
    } else {
        Attributes::Plain
    }
}

/// Bytes an attribute has to take to be shared: reading a shared one costs the kernel a block more.
const SHARED_MIN: u64 = 64;
/// Most that one inode can share: the header counts them in a byte.
const SHARED_MAX: usize = 255;
/// In the place of a shared attribute's number: it is not shared.
const OWN: u32 = u32::MAX;

/// Which attributes of a tree are shared, and where.
#[derive(Debug)]
pub(super) struct Shared {
    /// By attribute.
    numbers: Vec<u32>,
    /// Bytes of the area.
    pub bytes: u64,
}

impl Shared {
    /// Shares the large attributes that more than one inode has.
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
                // Beyond that the area ends: a number would be taken for none.
                if size >= SHARED_MIN && bytes / 4 + size / 4 < u64::from(OWN) {
                    numbers[at] = (bytes / 4) as u32;
                    bytes += size;
                }
            }
        }
        Self { numbers, bytes }
    }

    /// The attributes of a node that it shares, and those of its own that can be stored.
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

    /// Bytes the attributes of a node take behind its inode, and how many are left out: those of namespaces neither EROFS nor
    /// setxattr(2) knows, and of sizes Linux does not take. The error is the size and the limit.
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

    /// Numbers of the attributes in the area, in the order in which they stand there.
    pub fn area(&self) -> impl Iterator<Item = AttributeId> {
        let mut order: Vec<_> = (0..).zip(&self.numbers).filter(|(_, number)| **number != OWN).collect();
        order.sort_unstable_by_key(|(_, number)| **number);
        order.into_iter().map(|(id, _)| id)
    }
}

/// Appends an attribute as stored; nothing if it cannot be.
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
    /// Numbers of shared attributes not yet read.
    shared: &'a [u8],
    /// The area where those stand, and what follows it.
    area: &'a [u8],
    /// Attributes of its own not yet read.
    rest: &'a [u8],
}

impl<'a> XattrIter<'a> {
    /// `behind` is what lies behind the inode: nothing, or a header and what it tells of. `area` begins with the shared ones.
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

    /// The next attribute, and goes on behind it; nothing if there is none where one must be.
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

/// The attribute that `bytes` begin with, and its size.
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
