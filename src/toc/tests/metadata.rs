//! Tests of names, owners, times, device numbers and attributes, in every place where a tar can have them.

use super::*;

#[test]
fn device_numbers_match_the_kernel() {
    let number = |major, minor| DeviceNumber { major, minor };
    assert_eq!(number(8, 1).encoded(), 0x801);
    let large = (70000 & 0xff) | 300 << 8 | (70000 & !0xff) << 12;
    assert_eq!(number(300, 70000).encoded(), large);
    assert_eq!(DeviceNumber::decode(large), number(300, 70000));
    assert_eq!(DeviceNumber::decode(u32::MAX), number(0xfff, 0xf_ffff));
}

#[test]
fn precedence_of_names() {
    let long = entry("L", b'L', b"from-L\0", &[GNU]);
    let link = entry("K", b'K', b"from-K", &[GNU]);
    let records = pax(&[("path", b"from-pax"), ("linkpath", b"pax-link")]);
    let symlink = entry("name", b'2', b"", &[(157, b"header")]);
    let read_one = |parts: &[Vec<u8>]| {
        let toc = read(&[parts, std::slice::from_ref(&symlink)].concat()).unwrap();
        let EntryKind::Symlink(target) = &toc.entries[0].kind else {
            panic!()
        };
        format!("{}>{}", paths(&toc)[0], String::from_utf8_lossy(target))
    };
    assert_eq!(read_one(&[]), "name>header");
    assert_eq!(read_one(std::slice::from_ref(&records)), "from-pax>pax-link");
    assert_eq!(read_one(&[records.clone(), long.clone()]), "from-L>pax-link");
    assert_eq!(read_one(&[long.clone(), link, records.clone()]), "from-L>from-K");
    assert_eq!(read_one(&[records, pax(&[("uid", b"7")])]), "name>header");
    let two = read(&[long, symlink.clone(), symlink]).unwrap();
    assert_eq!(paths(&two), ["from-L", "name"]);
}

#[test]
fn pax_overrides_fields() {
    let bad_field: (usize, &[u8]) = (108, b"nonsense");
    let toc = read(&[
        pax(&[
            ("size", b"3"),
            ("uid", b"4294967295"),
            ("gid", b"-2"),
            ("mtime", b"-1.5"),
            ("SCHILY.xattr.user.a", b"1"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.odd.name", b"1"),
            ("LIBARCHIVE.xattr.user.b", b"Mg"),
        ]),
        [header("f", b'0', 9999, &[bad_field]), padded(b"abc")].concat(),
        pax(&[("size", b"")]),
        entry("g", b'0', b"x", &[]),
    ])
    .unwrap();
    let entry = &toc.entries[0];
    let meta = Metadata {
        mode: 0o644,
        uid: 0,
        gid: u32::MAX - 1,
        mtime: -2,
        mtime_nsec: 500_000_000,
    };
    assert_eq!((entry.meta, &entry.kind), (meta, &EntryKind::Regular(flat(3, 0))));
    let xattr = |name: &str, value: &[u8]| (name.as_bytes().into(), value.into());
    assert_eq!(entry.xattrs, [xattr("user.a", b"1"), xattr("user.b", b"2")]);
    assert_eq!(toc.warnings.len(), 3);
    assert_eq!(paths(&toc), ["f", "g"]);
    for (at, bytes) in [
        (108, &b"nonsense"[..]),
        (136, b"nonsense\0\0\0\0"),
        (124, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
    ] {
        assert!(
            matches!(
                read(&[header("f", b'0', 0, &[(at, bytes)])]),
                Err(TocError::BadField { .. })
            ),
            "{at}"
        );
    }
}

#[test]
fn owners_and_device_numbers_out_of_range_are_what_engines_make_of_them() {
    // Checked against podman 4.3, containerd 1.6 and umoci 0.4.
    for (id, owner) in [
        ("0", 0),
        ("+5", 5),
        ("4294967294", u32::MAX - 1),
        ("4294967295", 0),
        ("4294967296", 0),
        ("4294967301", 5),
        ("1099511627779", 3),
        ("-1", 0),
        ("-2", u32::MAX - 1),
        ("-2147483649", 0x7fff_ffff),
    ] {
        let owners = pax(&[("uid", id.as_bytes()), ("gid", id.as_bytes())]);
        let toc = read(&[owners, entry("f", b'0', b"", &[])]).unwrap();
        let Metadata { uid, gid, .. } = toc.entries[0].meta;
        assert_eq!((uid, gid), (owner, owner), "{id}");
        let odd = id.trim_start_matches('+') != owner.to_string();
        assert_eq!(toc.warnings.len(), if odd { 2 } else { 0 }, "{id}: {:?}", toc.warnings);
    }
    let large = |name: &str, low: u8| header(name, b'0', 0, &[(108, &[0x80, 0, 0, 1, 0, 0, 0, low])]);
    let toc = read(&[large("a", 7), large("b", 0)]).unwrap();
    assert_eq!([toc.entries[0].meta.uid, toc.entries[1].meta.uid], [7, 0]);
    assert_eq!(toc.warnings[0], "the uid 4294967303 of `a` is out of range, 7 is used");

    for (major, minor, expected) in [
        (&b"0010003\0"[..], &b"4000005\0"[..], (3, 5)),
        (b"\x80\0\0\x01\0\0\0\x03", b"\x80\0\x01\0\0\0\0\x05", (3, 5)),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff", b"0000001\0", (4095, 1)),
    ] {
        let toc = read(&[header("f", b'4', 0, &[(329, major), (337, minor)])]).unwrap();
        let (major, minor) = expected;
        assert_eq!(
            toc.entries[0].kind,
            EntryKind::BlockDevice(DeviceNumber { major, minor })
        );
        assert_eq!(toc.warnings.len(), 1, "{:?}", toc.warnings);
    }
}

#[test]
fn attributes_that_a_file_cannot_have_are_dropped() {
    let acl = |mask: u8| {
        let entries = [
            (1u16, 6u16, u32::MAX),
            (2, 4, 1000),
            (4, 0, u32::MAX),
            (0x10, mask.into(), u32::MAX),
            (0x20, 0, u32::MAX),
        ];
        let entries = entries
            .iter()
            .flat_map(|(tag, bits, id)| [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat());
        2u32.to_le_bytes().into_iter().chain(entries).collect::<Vec<u8>>()
    };
    let all = || {
        pax(&[
            ("SCHILY.xattr.user.a", b"1"),
            ("SCHILY.xattr.system.posix_acl_access", &acl(5)),
            ("SCHILY.xattr.system.posix_acl_default", &acl(5)),
            ("SCHILY.xattr.security.capability", b"odd"),
        ])
    };
    let (access, default) = ("system.posix_acl_access", "system.posix_acl_default");
    for (flag, kept, mode) in [
        (b'0', &[access, "user.a"][..], 0o650),
        (b'5', &[access, default, "user.a"], 0o650),
        (b'2', &[], 0o777),
        (b'6', &[access], 0o650),
    ] {
        let toc = read(&[all(), entry("f", flag, b"", &[(157, b"target")])]).unwrap();
        let entry = &toc.entries[0];
        let names: Vec<_> = entry
            .xattrs
            .iter()
            .map(|(name, _)| String::from_utf8_lossy(name))
            .collect();
        assert_eq!(
            (names, entry.meta.mode),
            (kept.iter().map(|n| (*n).into()).collect(), mode)
        );
        assert_eq!(toc.warnings.len(), 4 - kept.len(), "{:?}", toc.warnings);
    }
    // Engines enforce only the access control lists of SCHILY.xattr records. Lists in other records are ignored.
    let others = pax(&[
        (
            "SCHILY.acl.access",
            b"user::rw-,user:1000:r--,group::---,mask::r--,other::---",
        ),
        (
            "LIBARCHIVE.xattr.system.posix_acl_access",
            b"AgAAAAEABgD/////BAAAAP////8gAAAA/////w",
        ),
    ]);
    let toc = read(&[others, entry("f", b'0', b"", &[])]).unwrap();
    assert_eq!((toc.entries[0].xattrs.len(), toc.entries[0].meta.mode), (0, 0o644));
}
