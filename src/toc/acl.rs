//! POSIX access control lists as extended attributes carry them (kernel: include/uapi/linux/posix_acl_xattr.h).
//!
//! ```text
//! version u32 = 2, then entries {tag u16, permissions u16, id u32}, all little-endian
//! ```
//! The parser keeps only lists that setxattr(2) accepts, in the form in which the kernel returns them. With any other
//! list the file would be unusable, because the kernel denies access when it cannot parse the list.

/// Name of the attribute with the list that controls access to a file.
pub(super) const ACCESS: &[u8] = b"system.posix_acl_access";
/// Name of the attribute with the list that new entries of a directory inherit.
pub(super) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: [u8; 4] = 2u32.to_le_bytes();
const HEADER: usize = 4;
const ENTRY: usize = 8;
/// Longest list in bytes. FUSE reads a list into one page, and common file systems have one block for it.
const MAX: usize = 4096;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// The id in entries that name no user or group.
const NOBODY: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct AclEntry {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// An access control list that the kernel accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Acl(Vec<AclEntry>);

impl Acl {
    /// Parses the value of an attribute; `None` if the list is empty. The error says what is wrong with the list.
    pub fn parse(value: &[u8]) -> Result<Option<Self>, &'static str> {
        if value.len() > MAX {
            return Err("it has more than 4096 bytes");
        }
        let entries = value
            .strip_prefix(&VERSION)
            .ok_or("it is no access control list of version 2")?;
        if !entries.len().is_multiple_of(ENTRY) {
            return Err("it ends within an entry");
        }
        let mut list: Vec<AclEntry> = entries.chunks_exact(ENTRY).map(AclEntry::decode).collect();
        if list.is_empty() {
            return Ok(None);
        }
        for entry in &mut list {
            match entry.tag {
                USER | GROUP if entry.id == NOBODY => return Err("an entry names no user or group"),
                USER | GROUP => {}
                _ => entry.id = NOBODY,
            }
            if entry.permissions > 7 {
                return Err("an entry has unknown permissions");
            }
        }
        if is_ordered(&list) {
            Ok(Some(Self(list)))
        } else {
            Err("its entries are incomplete or out of order")
        }
    }

    /// Returns the list as the kernel returns it.
    pub fn encode(&self) -> Box<[u8]> {
        let mut value = Vec::with_capacity(HEADER + ENTRY * self.0.len());
        value.extend_from_slice(&VERSION);
        for entry in &self.0 {
            value.extend_from_slice(&entry.tag.to_le_bytes());
            value.extend_from_slice(&entry.permissions.to_le_bytes());
            value.extend_from_slice(&entry.id.to_le_bytes());
        }
        value.into()
    }

    /// Whether the list says no more than the mode bits say.
    pub fn is_minimal(&self) -> bool {
        self.0.len() == 3
    }

    /// Returns the permission bits of a file with this list.
    pub fn mode(&self) -> u16 {
        let group = self.find(MASK).or(self.find(GROUP_OBJ)).unwrap_or(0);
        self.find(USER_OBJ).unwrap_or(0) << 6 | group << 3 | self.find(OTHER).unwrap_or(0)
    }

    /// Changes the list as chmod(2) would.
    pub fn chmod(&mut self, mode: u16) {
        let class = if self.find(MASK).is_some() { MASK } else { GROUP_OBJ };
        for entry in &mut self.0 {
            match entry.tag {
                USER_OBJ => entry.permissions = mode >> 6 & 7,
                OTHER => entry.permissions = mode & 7,
                tag if tag == class => entry.permissions = mode >> 3 & 7,
                _ => {}
            }
        }
    }

    fn find(&self, tag: u16) -> Option<u16> {
        let found = self.0.iter().find(|entry| entry.tag == tag);
        found.map(|entry| entry.permissions)
    }
}

impl AclEntry {
    /// Decodes an entry from exactly [`ENTRY`] bytes.
    fn decode(bytes: &[u8]) -> Self {
        Self {
            tag: u16::from_le_bytes([bytes[0], bytes[1]]),
            permissions: u16::from_le_bytes([bytes[2], bytes[3]]),
            id: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }
    }
}

/// Whether the entries are complete and in the kernel's order (`posix_acl_valid`): owner, named users, group, named
/// groups, mask, others. The mask is required if a user or group is named.
fn is_ordered(list: &[AclEntry]) -> bool {
    let tags: Vec<u16> = list.iter().map(|entry| entry.tag).collect();
    let Some(rest) = tags.strip_prefix(&[USER_OBJ]) else {
        return false;
    };
    let users = rest.iter().take_while(|tag| **tag == USER).count();
    let Some(rest) = rest[users..].strip_prefix(&[GROUP_OBJ]) else {
        return false;
    };
    let groups = rest.iter().take_while(|tag| **tag == GROUP).count();
    match rest[groups..] {
        [MASK, OTHER] => true,
        [OTHER] => users + groups == 0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entries = entries
            .iter()
            .map(|&(tag, permissions, id)| AclEntry { tag, permissions, id });
        Acl(entries.collect()).encode().into()
    }

    const FULL: [(u16, u16, u32); 5] = [
        (1, 6, NOBODY),
        (2, 4, 1000),
        (4, 0, NOBODY),
        (0x10, 4, NOBODY),
        (0x20, 1, NOBODY),
    ];

    #[test]
    fn what_setxattr_takes_is_kept_as_the_kernel_shows_it() {
        let full = list(&FULL);
        let acl = Acl::parse(&full).unwrap().unwrap();
        assert_eq!(
            (acl.encode().to_vec(), acl.mode(), acl.is_minimal()),
            (full, 0o641, false)
        );
        // The parser clears the id of an entry that must not have one. Order and repetition of named users do not
        // matter.
        let odd = list(&[
            (1, 7, 5),
            (2, 1, 9),
            (2, 2, 8),
            (2, 3, 9),
            (4, 5, 6),
            (8, 4, 1),
            (0x10, 0, 7),
            (0x20, 2, 8),
        ]);
        let acl = Acl::parse(&odd).unwrap().unwrap();
        assert_eq!(acl.mode(), 0o702);
        assert!(
            acl.0
                .iter()
                .all(|entry| matches!(entry.tag, USER | GROUP) == (entry.id != NOBODY))
        );
        let minimal = Acl::parse(&list(&[(1, 7, 0), (4, 5, 0), (0x20, 0, 0)]))
            .unwrap()
            .unwrap();
        assert_eq!((minimal.is_minimal(), minimal.mode()), (true, 0o750));
        assert_eq!(Acl::parse(&list(&[])), Ok(None));
    }

    #[test]
    fn what_setxattr_refuses_is_refused() {
        let without = |tag: u16| list(&FULL.iter().copied().filter(|entry| entry.0 != tag).collect::<Vec<_>>());
        let with = |at: usize, entry| {
            let mut entries = FULL;
            entries[at] = entry;
            list(&entries)
        };
        let many: Vec<_> = [FULL[0]]
            .into_iter()
            .chain((0..507).map(|id| (2, 4, id)))
            .chain(FULL[2..].to_vec())
            .collect();
        assert!(Acl::parse(&list(&many)).is_ok());
        let more: Vec<_> = [FULL[0]]
            .into_iter()
            .chain((0..508).map(|id| (2, 4, id)))
            .chain(FULL[2..].to_vec())
            .collect();
        let full = list(&FULL);
        let bad = [
            Vec::new(),
            b"\x02\0".to_vec(),
            [&1u32.to_le_bytes()[..], &full[4..]].concat(),
            full[..full.len() - 3].to_vec(),
            without(USER_OBJ),
            without(GROUP_OBJ),
            without(OTHER),
            without(MASK),
            with(1, (2, 4, NOBODY)),
            with(1, (3, 4, 1000)),
            with(1, (2, 8, 1000)),
            with(1, (1, 4, NOBODY)),
            with(0, (2, 4, 1)),
            with(4, (0x10, 4, NOBODY)),
            list(&more),
        ];
        for value in bad {
            assert!(Acl::parse(&value).is_err(), "{}", value.escape_ascii());
        }
    }

    #[test]
    fn chmod_changes_the_mask_if_there_is_one() {
        let mut acl = Acl::parse(&list(&FULL)).unwrap().unwrap();
        acl.chmod(0o4765);
        let changed = [
            (1, 7, NOBODY),
            (2, 4, 1000),
            (4, 0, NOBODY),
            (0x10, 6, NOBODY),
            (0x20, 5, NOBODY),
        ];
        assert_eq!(acl.encode().to_vec(), list(&changed));
        let mut minimal = Acl::parse(&list(&[(1, 7, 0), (4, 5, 0), (0x20, 0, 0)]))
            .unwrap()
            .unwrap();
        minimal.chmod(0o604);
        assert_eq!(minimal.mode(), 0o604);
    }
}
