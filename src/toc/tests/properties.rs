//! Properties of reader, codec and extent table on random and damaged input.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::sparse::sparse_styles;
use super::*;

/// Generates parts of a tar, some valid and some not.
fn part() -> impl Strategy<Value = Vec<u8>> {
    let name = select(vec![
        "a",
        "d/b",
        "d/",
        "./c",
        "d/.wh.x",
        ".wh..wh..opq",
        "e/../f",
        ".wh..wh.plnk/1",
        "/",
    ]);
    let flag = select(b"001234567SLKDgAxV\0".to_vec());
    let sparse = vec((0u64..100_000, 0u64..9000), 0..40).prop_flat_map(|steps| {
        let mut at = 0;
        let pieces: Vec<_> = steps
            .iter()
            .map(|&(gap, len)| {
                let start = at + gap;
                at = start + len;
                (start, len)
            })
            .collect();
        (0usize..4, 0u64..100_000).prop_map(move |(style, tail)| sparse_styles(at + tail, &pieces).swap_remove(style))
    });
    prop_oneof![
        5 => (name, flag, vec(any::<u8>(), 0..3000)).prop_map(|(name, flag, data)| {
            // Random bytes are not a valid pax header, but they can be a name.
            let data = if flag == b'x' { pax_record("SCHILY.xattr.user.r", &data) } else { data };
            let data: &[u8] = if flag == b'S' { b"" } else { &data };
            match flag {
                b'1'..=b'6' => header(name, flag, data.len() as u64, &[(157, b"d/target")]),
                b'S' => header(name, flag, 0, &[GNU]),
                b'L' | b'K' => entry(name, flag, &data[..data.len().min(200)], &[GNU]),
                _ => entry(name, flag, data, &[]),
            }
        }),
        1 => sparse,
        1 => (any::<u32>(), any::<i32>(), 0u32..1_000_000_000).prop_map(|(uid, secs, nanos)| {
            let time = format!("{secs}.{nanos:09}");
            pax(&[("uid", uid.to_string().as_bytes()), ("mtime", time.as_bytes()), ("SCHILY.xattr.user.u", b"v")])
        }),
    ]
}

fn tar() -> impl Strategy<Value = Vec<u8>> {
    (vec(part(), 0..12), select(vec![0usize, 512, 1024, 9000]))
        .prop_map(|(parts, zeros)| [parts.concat(), vec![0; zeros]].concat())
}

/// Returns the rough heap size of a table.
fn weight(toc: &Toc) -> usize {
    let xattrs = |e: &TocEntry| e.xattrs.iter().map(|(n, v)| 32 + n.len() + v.len()).sum::<usize>();
    let kind = |kind: &EntryKind| match kind {
        EntryKind::Regular(FileData {
            layout: DataLayout::Chunked { chunks, .. },
            ..
        })
        | EntryKind::Hidden(FileData {
            layout: DataLayout::Chunked { chunks, .. },
            ..
        }) => chunks.len() * 16,
        EntryKind::Symlink(target) | EntryKind::Hardlink(target) => target.len(),
        _ => 0,
    };
    let entries: usize = toc
        .entries
        .iter()
        .map(|e| size_of::<TocEntry>() + e.path.len() + xattrs(e) + kind(&e.kind))
        .sum();
    entries + toc.extents.len() * 24 + toc.warnings.iter().map(String::len).sum::<usize>()
}

fn check_table(toc: &Toc) {
    let mut encoded = Vec::new();
    toc.encode(&mut encoded).unwrap();
    assert_eq!(&Toc::decode(&encoded).unwrap(), toc);
    let table = toc.extent_table();
    let mut bytes = Vec::new();
    table.encode(&mut bytes).unwrap();
    let table = ExtentTable::open(bytes.as_slice()).unwrap();
    assert!(table.iter().eq(toc.extents.iter().copied()));
    assert_eq!(table.device_size(), toc.device_size);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn splits_do_not_matter(tar in tar(), sizes in vec(1usize..2000, 1..20)) {
        let whole = read_split(&tar, || usize::MAX);
        prop_assert_eq!(&read_split(&tar, || 1), &whole);
        let mut sizes = sizes.iter().cycle();
        prop_assert_eq!(&read_split(&tar, || *sizes.next().unwrap()), &whole);
        if let Ok((toc, delivered)) = whole {
            let expected: u64 = toc.extents.iter().map(|e| e.len).sum();
            prop_assert_eq!(delivered.iter().map(|d| d.1.len() as u64).sum::<u64>(), expected);
            check_table(&toc);
        }
    }

    #[test]
    fn damage_is_survived(
        tar in tar(),
        flips in vec((any::<prop::sample::Index>(), 0u32..8), 0..6),
        sums in any::<bool>(),
        len in any::<prop::sample::Index>(),
    ) {
        let mut tar = tar;
        for (at, bit) in &flips {
            if !tar.is_empty() {
                let at = at.index(tar.len());
                tar[at] ^= 1 << bit;
                if sums {
                    // Renew the checksum if the block was a header. Otherwise the reader refuses the block and never
                    // sees the damage behind it.
                    let block = at / 512 * 512;
                    if let Some(block) = tar.get_mut(block..block + 512).filter(|b| b[148..152].is_ascii() && b[154] == 0) {
                        block[148..156].fill(b' ');
                        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
                        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                    }
                }
            }
        }
        if len.index(4) == 0 {
            tar.truncate(len.index(tar.len() + 1));
        }
        if let Ok((toc, _)) = read_split(&tar, || usize::MAX) {
            prop_assert!(weight(&toc) <= 40 * tar.len());
            check_table(&toc);
        }
    }

    #[test]
    fn any_table_survives_the_codec(toc in toc()) {
        check_table(&toc);
    }

    #[test]
    fn damaged_tables_are_refused(toc in toc(), at in any::<prop::sample::Index>(), bit in 0u32..8) {
        let (mut encoded, mut table) = (Vec::new(), Vec::new());
        toc.encode(&mut encoded).unwrap();
        toc.extent_table().encode(&mut table).unwrap();
        let flip = |bytes: &mut Vec<u8>| { let at = at.index(bytes.len()); bytes[at] ^= 1 << bit; };
        flip(&mut encoded);
        flip(&mut table);
        prop_assert!(Toc::decode(&encoded).is_err());
        prop_assert!(ExtentTable::open(table.as_slice()).is_err());
        prop_assert!(Toc::decode(&encoded[..at.index(encoded.len())]).is_err());
        prop_assert!(ExtentTable::open(&table[..at.index(table.len())]).is_err());
        // Anyone can compute a valid checksum, so the decoder has to check what a valid checksum covers.
        for bytes in [&mut encoded, &mut table] {
            let content = bytes.len() - 32;
            let hash = blake3::hash(&bytes[..content]);
            bytes[content..].copy_from_slice(hash.as_bytes());
        }
        if let Ok(toc) = Toc::decode(&encoded) {
            check_table(&toc);
        }
        if let Ok(table) = ExtentTable::open(table) {
            table.pieces_in_device(0..u64::MAX).for_each(drop);
        }
    }

    #[test]
    fn lookups_agree_with_a_scan(toc in toc(), from in 0u64..300_000, len in 0u64..100_000) {
        let table = toc.extent_table();
        let range = from..from + len;
        let scan = |start: fn(&Extent) -> u64| {
            let range = range.clone();
            toc.extents.iter().filter_map(move |e| {
                let (low, high) = (range.start.max(start(e)), range.end.min(start(e) + e.len));
                let skip = low.saturating_sub(start(e));
                (low < high).then(|| Extent { tar: e.tar + skip, device: e.device + skip, len: high - low })
            })
        };
        prop_assert!(table.pieces_in_tar(range.clone()).eq(scan(|e| e.tar)));
        prop_assert!(table.pieces_in_device(range.clone()).eq(scan(|e| e.device)));
    }
}

fn bytes(max: usize) -> impl Strategy<Value = Box<[u8]>> {
    vec(any::<u8>(), 0..max).prop_map(Vec::into_boxed_slice)
}

fn path() -> impl Strategy<Value = Box<[u8]>> {
    let component = vec(any::<u8>().prop_filter("", |b| !matches!(b, 0 | b'/' | b'.')), 1..=255);
    vec(prop_oneof![component, Just(b"usr".to_vec())], 1..6).prop_map(|parts| parts.join(&b'/').into())
}

fn xattrs() -> impl Strategy<Value = Xattrs> {
    const ACL: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\0\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";
    let capabilities = || [&[0, 0, 0, 2][..], &[7; 16]].concat().into_boxed_slice();
    let xattr = prop_oneof![
        3 => ("user\\.[a-z]{1,250}".prop_map(|n| n.into_bytes()), bytes(300)),
        1 => (Just(b"security.capability".to_vec()), Just(capabilities())),
        1 => (Just(b"system.posix_acl_access".to_vec()), Just(ACL.into())),
    ];
    vec(xattr, 0..4).prop_map(|list| {
        let unique: std::collections::BTreeMap<_, _> = list.into_iter().collect();
        unique.into_iter().map(|(name, value)| (name.into(), value)).collect()
    })
}

const DEVICE: u64 = 1 << 42;

fn data() -> impl Strategy<Value = FileData> {
    let flat = (0..DEVICE / 2, 0..DEVICE / 2 / 4096)
        .prop_map(|(size, block)| flat(size, if size > 0 { block * 4096 } else { 0 }));
    let chunked = (
        0u8..20,
        prop::collection::btree_map(0u32..1000, 0..(DEVICE - (1 << 32)) / 4096, 0..20),
    )
        .prop_map(|(chunk_bits, chunks)| {
            let last = chunks.keys().last().map_or(0, |&n| u64::from(n) + 1);
            let chunks = chunks.into_iter().map(|(n, block)| (n, block * 4096)).collect();
            FileData {
                size: last * (4096 << chunk_bits),
                layout: DataLayout::Chunked { chunk_bits, chunks },
            }
        });
    prop_oneof![3 => flat, 1 => chunked]
}

fn kind() -> impl Strategy<Value = EntryKind> {
    let target = vec(1u8.., 1..300).prop_map(Vec::into_boxed_slice);
    prop_oneof![
        Just(EntryKind::Directory),
        data().prop_map(EntryKind::Regular),
        data().prop_map(EntryKind::Hidden),
        target.prop_map(EntryKind::Symlink),
        path().prop_map(EntryKind::Hardlink),
        (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| EntryKind::CharDevice(DeviceNumber { major, minor })),
        (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| EntryKind::BlockDevice(DeviceNumber { major, minor })),
        Just(EntryKind::Fifo),
        Just(EntryKind::Whiteout),
        Just(EntryKind::Opaque),
    ]
}

/// Generates any table that keeps the invariants.
fn toc() -> impl Strategy<Value = Toc> {
    let meta = (
        0u16..0o10000,
        0..u32::MAX,
        0..u32::MAX,
        any::<i64>(),
        0u32..1_000_000_000,
    )
        .prop_map(|(mode, uid, gid, mtime, mtime_nsec)| Metadata {
            mode,
            uid,
            gid,
            mtime,
            mtime_nsec,
        });
    let entry = (path(), kind(), meta, xattrs()).prop_map(|(path, kind, meta, xattrs)| TocEntry {
        path,
        kind,
        meta,
        xattrs,
    });
    let extents = vec((0u64..5000, 0u64..5000, 1u64..9000), 0..60).prop_map(|steps| {
        let (mut tar, mut device) = (0, 0);
        let place = |(a, b, len): (u64, u64, u64)| {
            let extent = Extent {
                tar: tar + a,
                device: device + b,
                len,
            };
            (tar, device) = (extent.tar + len, extent.device + len);
            extent
        };
        steps.into_iter().map(place).collect::<Vec<_>>()
    });
    (vec(entry, 0..12), extents, vec(".{0,80}", 0..3)).prop_map(|(entries, extents, warnings)| Toc {
        entries,
        extents,
        device_size: DEVICE,
        warnings,
    })
}
