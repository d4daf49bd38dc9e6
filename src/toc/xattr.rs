//! The filter that decides which extended attributes of a tar are kept.
//!
//! A layer must not be able to control overlayfs (`trusted.overlay.*`, `user.overlay.*`). Labels of the machine that
//! built the image (`security.selinux`) mean nothing on the host. The filter drops both. Of the rest it keeps what
//! EROFS can store and a file system would accept. [`select`] checks names and sizes. [`fit`] checks which attributes
//! belong to which type of file.

use std::collections::BTreeMap;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::acl::{self, Acl};
use super::{Metadata, Xattrs};

/// Longest name in bytes (`XATTR_NAME_MAX` of Linux).
const NAME_MAX: usize = 255;
/// Longest value in bytes. `XATTR_SIZE_MAX` is 65536, but the size field of an EROFS xattr entry has 16 bits.
const VALUE_MAX: usize = 65535;
/// Most bytes that all entries of one EROFS inode take, each with 4 bytes of header and padded to 4. The 16-bit
/// `xattr_icount` counts words of 4 bytes.
const TOTAL_MAX: usize = 65534 * 4;

/// Attributes of pax records: value by name.
pub(super) type RawXattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// Base64 with or without padding. libarchive writes no padding, but other writers of its keyword do.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// What the filter does with an attribute.
#[derive(Debug, PartialEq, Eq)]
enum XattrVerdict {
    Keep,
    /// Drop it by policy, without a warning.
    Drop,
    /// Drop it with a warning: neither the kernel nor EROFS has a place for the name.
    Unstorable,
}

fn verdict(name: &[u8]) -> XattrVerdict {
    if name == b"security.selinux" || name.starts_with(b"trusted.") || name.starts_with(b"user.overlay.") {
        return XattrVerdict::Drop;
    }
    let suffix = name.strip_prefix(b"user.").or_else(|| name.strip_prefix(b"security."));
    let named = suffix.is_some_and(|s| !s.is_empty() && !s.contains(&0)) && name.len() <= NAME_MAX;
    if is_acl(name) || named {
        XattrVerdict::Keep
    } else {
        XattrVerdict::Unstorable
    }
}

fn is_acl(name: &[u8]) -> bool {
    name == acl::ACCESS || name == acl::DEFAULT
}

/// Merges the two pax spellings and applies the filter. Calls `dropped` for each attribute that the image should have
/// but loses.
///
/// A `LIBARCHIVE.xattr.NAME` record has a percent-encoded name and a base64 value. The record counts only if there is
/// no `SCHILY.xattr.NAME` record, because bsdtar writes both. Access control lists never count in the libarchive
/// spelling, because no engine enforces them there.
pub(super) fn select(schily: RawXattrs, libarchive: RawXattrs, mut dropped: impl FnMut(&[u8], &'static str)) -> Xattrs {
    let mut found = schily;
    for (raw, value) in libarchive {
        let name = percent_decode(&raw);
        // libarchive encodes the name under both keywords, but the engines use the SCHILY name as it is.
        let ignored = verdict(&name) == XattrVerdict::Drop || is_acl(&name);
        if found.contains_key(&raw) || found.contains_key(&name) || ignored {
            continue;
        }
        match BASE64.decode(&value) {
            Ok(value) => drop(found.insert(name, value.into())),
            Err(_) => dropped(&name, "its value is not base64"),
        }
    }
    let mut total = 0;
    found
        .into_iter()
        .filter(|(name, value)| {
            let size = entry_size(name, value.len());
            match verdict(name) {
                XattrVerdict::Drop => return false,
                XattrVerdict::Unstorable => dropped(name, "its name cannot be stored"),
                XattrVerdict::Keep if value.len() > VALUE_MAX => dropped(name, "its value has more than 65535 bytes"),
                XattrVerdict::Keep if total + size > TOTAL_MAX => dropped(name, "the entry has too many of them"),
                XattrVerdict::Keep => {
                    total += size;
                    return true;
                }
            }
            false
        })
        .collect()
}

/// The type of file that has the attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// A regular file, or a hard link, which mostly points at a regular file.
    File,
    Directory,
    Symlink,
    /// A device or named pipe.
    Special,
}

/// Removes the attributes that setxattr(2) would refuse on a file of this type. Gives `meta` the mode that the access
/// control list stands for. Calls `dropped` for each attribute that the image should have but loses.
pub(super) fn fit(
    xattrs: &mut Xattrs,
    holder: Holder,
    meta: &mut Metadata,
    mut dropped: impl FnMut(&[u8], &'static str),
) {
    const WRONG_TYPE: &str = "a file of this type cannot have it";
    xattrs.retain_mut(|(name, value)| {
        let problem = match &name[..] {
            acl::ACCESS if holder == Holder::Symlink => WRONG_TYPE,
            acl::DEFAULT if holder != Holder::Directory => WRONG_TYPE,
            acl::ACCESS | acl::DEFAULT => match Acl::parse(value) {
                Ok(None) => return false,
                Ok(Some(acl)) => {
                    *value = acl.encode();
                    if **name == *acl::DEFAULT {
                        return true;
                    }
                    meta.mode = meta.mode & 0o7000 | acl.mode();
                    return !acl.is_minimal();
                }
                Err(problem) => problem,
            },
            b"security.capability" if !is_capability(value) => "it is no set of capabilities",
            name if name.starts_with(b"user.") && matches!(holder, Holder::Symlink | Holder::Special) => WRONG_TYPE,
            _ => return true,
        };
        dropped(name, problem);
        false
    });
}

/// Returns the attribute's value after chmod(2) with `mode`; `None` if the attribute is no access control list.
pub(crate) fn chmod(name: &[u8], value: &[u8], mode: u16) -> Option<Box<[u8]>> {
    if name != acl::ACCESS {
        return None;
    }
    let mut acl = Acl::parse(value).ok()??;
    acl.chmod(mode);
    Some(acl.encode())
}

/// Whether the kernel understands a value of `security.capability` (linux/capability.h, `vfs_ns_cap_data`).
fn is_capability(value: &[u8]) -> bool {
    let revision = value.first_chunk().map(|magic| u32::from_le_bytes(*magic) >> 24);
    matches!((revision, value.len()), (Some(1), 12) | (Some(2), 20) | (Some(3), 24))
}

/// Whether the kernel accepts the attribute's value on a file of the right type.
pub(super) fn is_sound(name: &[u8], value: &[u8]) -> bool {
    match name {
        acl::ACCESS | acl::DEFAULT => matches!(Acl::parse(value), Ok(Some(acl)) if *acl.encode() == *value),
        b"security.capability" => is_capability(value),
        _ => true,
    }
}

/// Checks that attributes, taken one by one, form a list that [`select`] and [`fit`] can make.
#[derive(Debug, Default)]
pub(super) struct ListCheck {
    last: Option<Box<[u8]>>,
    total: usize,
}

impl ListCheck {
    /// Takes the next attribute. Returns false if it cannot come next in such a list.
    pub fn allows(&mut self, name: &[u8], value_len: usize) -> bool {
        let ascending = self.last.as_deref().is_none_or(|last| last < name);
        self.last = Some(name.into());
        self.total += entry_size(name, value_len);
        ascending && verdict(name) == XattrVerdict::Keep && value_len <= VALUE_MAX && self.total <= TOTAL_MAX
    }
}

/// Returns an upper bound of the bytes that the attribute takes in an EROFS inode, which stores the prefix as a
/// number.
fn entry_size(name: &[u8], value_len: usize) -> usize {
    (4 + name.len() + value_len).next_multiple_of(4)
}

/// Decodes percent encoding: `%41` becomes `A`. A percent sign without two hex digits behind it stays as it is.
fn percent_decode(raw: &[u8]) -> Box<[u8]> {
    let hex = |b: u8| char::from(b).to_digit(16);
    let mut out = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let [first, tail @ ..] = rest {
        rest = tail;
        let mut byte = *first;
        if let (b'%', [high, low, after @ ..]) = (byte, tail)
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            byte = (high * 16 + low) as u8;
            rest = after;
        }
        out.push(byte);
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An access control list for owner, group and others.
    const LIST: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\0\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";

    fn raw(list: &[(&str, &[u8])]) -> RawXattrs {
        list.iter().map(|(n, v)| (n.as_bytes().into(), (*v).into())).collect()
    }

    fn run(schily: &[(&str, &[u8])], libarchive: &[(&str, &[u8])]) -> (Vec<(String, Vec<u8>)>, usize) {
        let mut dropped = 0;
        let kept = select(raw(schily), raw(libarchive), |_, _| dropped += 1);
        let mut check = ListCheck::default();
        assert!(kept.iter().all(|(name, value)| check.allows(name, value.len())));
        let text = |(n, v): (Box<[u8]>, Box<[u8]>)| (String::from_utf8(n.into()).unwrap(), v.into());
        (kept.into_iter().map(text).collect(), dropped)
    }

    #[test]
    fn filter() {
        let keep = [
            "security.capability",
            "security.ima",
            "system.posix_acl_access",
            "system.posix_acl_default",
            "user.a",
            "user.overlay",
        ];
        let silent = [
            "security.selinux",
            "trusted.overlay.opaque",
            "trusted.x",
            "user.overlay.opaque",
        ];
        let warned = [
            "user.",
            "security.",
            "system.nfs4_acl",
            "com.apple.quarantine",
            "user.a\0b",
            "",
        ];
        let all: Vec<_> = keep
            .iter()
            .chain(&silent)
            .chain(&warned)
            .map(|n| match *n {
                "security.capability" => (*n, &b"\0\0\0\x02twenty bytes in all"[..20]),
                n if n.starts_with("system.posix") => (n, LIST),
                n => (n, &b"v"[..]),
            })
            .collect();
        let (kept, dropped) = run(&all, &[]);
        assert_eq!(kept.iter().map(|k| k.0.as_str()).collect::<Vec<_>>(), keep);
        assert_eq!(dropped, warned.len());
    }

    #[test]
    fn sizes() {
        let long = format!("user.{}", "n".repeat(250));
        let longer = format!("{long}n");
        assert_eq!(run(&[(&long, b""), (&longer, b"")], &[]).1, 1);
        let big = vec![7; 65536];
        assert_eq!(run(&[("user.a", &big), ("user.b", &big[1..])], &[]).0.len(), 1);
        let names: Vec<_> = (0..6).map(|i| format!("user.{i}")).collect();
        let many: Vec<_> = names.iter().map(|n| (n.as_str(), &big[1..])).collect();
        let (kept, dropped) = run(&many, &[]);
        assert_eq!((kept.len(), dropped), (3, 3));
    }

    #[test]
    fn libarchive_is_second_choice() {
        let (kept, dropped) = run(
            &[("user.both", b"raw"), ("user.as%20is", b"1")],
            &[
                ("user.both", b"b3RoZXI"),
                ("user.as%20is", b"MQ"),
                ("user.only%3D%25%zz", b"AAEC/w"),
                ("user.padded", b"AQ=="),
                ("user.bad", b"?"),
                ("trusted.bad", b"?"),
            ],
        );
        let expected: [(&str, &[u8]); 4] = [
            ("user.as%20is", b"1"),
            ("user.both", b"raw"),
            ("user.only=%%zz", &[0, 1, 2, 255]),
            ("user.padded", &[1]),
        ];
        assert_eq!(
            kept.iter().map(|(n, v)| (n.as_str(), &v[..])).collect::<Vec<_>>(),
            expected
        );
        assert_eq!(dropped, 1);
    }
}
