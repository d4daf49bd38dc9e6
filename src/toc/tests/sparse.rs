//! Tests of sparse files in all four styles.

use super::*;

const PIECES: [(u64, u64); 3] = [(5000, 100), (7000, 8000), (39_999, 1)];

/// Makes the same sparse file in all four styles: headers, map, data.
pub(super) fn sparse_styles(size: u64, pieces: &[(u64, u64)]) -> Vec<Vec<u8>> {
    let stored: u64 = pieces.iter().map(|p| p.1).sum();
    let data = vec![b'd'; stored as usize];
    let size_text = size.to_string();
    let list: Vec<String> = pieces.iter().flat_map(|p| [p.0.to_string(), p.1.to_string()]).collect();
    let pairs: Vec<u8> = pieces
        .iter()
        .flat_map(|p| format!("{:011o}\0{:011o}\0", p.0, p.1).into_bytes())
        .collect();
    let (first, more) = pairs.split_at(pairs.len().min(96));
    let real = format!("{size:011o}\0");
    let mut old = header(
        "f",
        b'S',
        stored,
        &[
            GNU,
            (386, first),
            (482, &[u8::from(!more.is_empty())]),
            (483, real.as_bytes()),
        ],
    );
    let blocks: Vec<_> = more.chunks(504).collect();
    for (i, chunk) in blocks.iter().enumerate() {
        let mut block = chunk.to_vec();
        block.resize(512, 0);
        block[504] = u8::from(i + 1 < blocks.len());
        old.extend(block);
    }
    old.extend(padded(&data));

    let mut zero_zero = vec![
        ("GNU.sparse.size", size_text.as_bytes()),
        ("GNU.sparse.numblocks", b"3"),
    ];
    for pair in list.chunks(2) {
        zero_zero.push(("GNU.sparse.offset", pair[0].as_bytes()));
        zero_zero.push(("GNU.sparse.numbytes", pair[1].as_bytes()));
    }
    let joined = list.join(",");
    let zero_one: [(&str, &[u8]); 3] = [
        ("GNU.sparse.size", size_text.as_bytes()),
        ("GNU.sparse.map", joined.as_bytes()),
        ("GNU.sparse.name", b"f"),
    ];
    let one_zero: [(&str, &[u8]); 5] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"f"),
        ("GNU.sparse.realsize", size_text.as_bytes()),
        ("path", b"GNUSparseFile.1/f"),
    ];
    let map = padded(format!("{}\n{}\n", pieces.len(), list.join("\n")).as_bytes());
    vec![
        old,
        [pax(&zero_zero), entry("f", b'0', &data, &[])].concat(),
        [pax(&zero_one), entry("GNUSparseFile.1/f", b'0', &data, &[])].concat(),
        [pax(&one_zero), entry("decoy", b'0', &[map, data].concat(), &[])].concat(),
    ]
}

#[test]
fn sparse_styles_agree() {
    let many: Vec<_> = (0..60).map(|i| (i * 10_000, 10)).chain([(700_000, 0)]).collect();
    for (size, pieces) in [
        (40_000, &PIECES[..]),
        (700_000, &many),
        (0, &[(0, 0)]),
        (9, &[(0, 9)]),
        (5000, &[(5000, 0)]),
    ] {
        let tocs: Vec<_> = sparse_styles(size, pieces)
            .into_iter()
            .map(|tar| read(&[tar, entry("after", b'0', b"x", &[])]).unwrap())
            .collect();
        for toc in &tocs {
            assert_eq!(paths(toc), ["f", "after"]);
            assert_eq!(
                (&toc.entries[0].kind, toc.device_size),
                (&tocs[0].entries[0].kind, tocs[0].device_size)
            );
        }
    }
    let whole = read(&sparse_styles(9, &[(0, 4), (4, 5)])[..1]).unwrap();
    assert_eq!(whole.entries[0].kind, EntryKind::Regular(flat(9, 0)));
    let hole = read(&sparse_styles(5000, &[(5000, 0)])[3..]).unwrap();
    let EntryKind::Regular(FileData {
        size: 5000,
        layout: DataLayout::Chunked { chunks, .. },
    }) = &hole.entries[0].kind
    else {
        panic!("{hole:?}")
    };
    assert_eq!((chunks.len(), hole.device_size), (0, 0));
}

#[test]
fn bad_sparse_maps() {
    let bad: [(u64, &[(u64, u64)]); 4] = [
        (100, &[(0, 10), (5, 10)]),
        (100, &[(95, 10)]),
        (100, &[(50, 1), (0, 1)]),
        (1 << 40, &[(1 << 41, 1)]),
    ];
    for (size, pieces) in bad {
        for (style, tar) in sparse_styles(size, pieces).into_iter().enumerate() {
            let error = read(&[tar]).unwrap_err();
            assert!(matches!(error, TocError::BadSparse { .. }), "{style}: {error}");
        }
    }
    // A file of an exbibyte with one byte at its end is refused at once, in every style.
    for tar in sparse_styles((1 << 60) + 1, &[(1 << 60, 1)]).drain(1..) {
        let error = read(&[tar]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "tar entry `f` has {} bytes and does not fit: a layer can have {} bytes of file content",
                (1u64 << 60) + 1,
                8u64 << 40
            )
        );
    }
    // Few bytes may take terabytes of device addresses, until the device is full.
    let piece = |i: u64| sparse_styles(4 << 40, &[(i << 30, 1), ((4 << 40) - 1, 1)]).remove(2);
    let toc = read(&[piece(0), piece(1)]).unwrap();
    assert_eq!(toc.device_size, 16 << 30);
    let full: Vec<_> = (0..2000).map(piece).collect();
    assert!(matches!(read(&full), Err(TocError::TooLarge { .. })));
    // Records that do not make the entry a sparse file do not count, as in the engines.
    let plain: [&[(&str, &[u8])]; 4] = [
        &[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")],
        &[("GNU.sparse.major", b"1")],
        &[("GNU.sparse.name", b"other")],
        &[("GNU.sparse.name", b"other"), ("GNU.sparse.realsize", b"9")],
    ];
    for records in plain {
        let toc = read(&[pax(records), entry("f", b'0', b"1", &[])]).unwrap();
        assert_eq!(
            (&*paths(&toc)[0], &toc.entries[0].kind),
            ("f", &EntryKind::Regular(flat(1, 0)))
        );
    }
    for map in ["", "3\n0\n", "x\n"] {
        let v1 = pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.realsize", b"10"),
        ]);
        let error = read(&[v1, entry("f", b'0', map.as_bytes(), &[])]).unwrap_err();
        assert!(matches!(error, TocError::BadSparse { .. }), "{error}");
    }
}
