//! Tables and chunks without a mount: what is read from a table is what a pass over the same tar finds.

use ocifs::oci::{Descriptor, Digest};
use ocifs::span::{ChunkSpans, SpanMap};
use ocifs::toc::carried::{CarriedError, CarriedTables, TableRef};
use ocifs::toc::{ChunkTable, EntryKind, Limits, PackedToc, TarReader, Toc, TocEntry};
use serde_json::{Value, json};

use crate::common::carried::{CarriedBlob, Change, Dialect, STARGZ_DIGEST, Writer};
use crate::common::layers::{Tar, header, noise};

/// A tar with an entry of every kind.
fn tar() -> Tar {
    let special = |name: &str, kind, major, minor| {
        let mut header = header(name.as_bytes(), kind, 0o600, 0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header
    };
    let mut setuid = header(b"bin/su", tar::EntryType::Regular, 0o4755, 9);
    setuid.set_uid(7);
    setuid.set_gid(70_000);
    setuid.set_mtime(0);
    Tar::new()
        .dir("./")
        .dir("bin/")
        .raw(setuid, b"#!/bin/sh")
        .file("empty", "")
        .file("small-1", noise(1, 100))
        .pax(&[("SCHILY.xattr.user.note", b"hello"), ("SCHILY.xattr.trusted.x", b"no")])
        .file("small-2", noise(2, 3000))
        .link(tar::EntryType::Symlink, "link", "bin/su")
        .file("large", noise(3, 300_000))
        .file("holes", [noise(4, 50_000), vec![0; 200_000], noise(5, 1234)].concat())
        .link(tar::EntryType::Link, "hard", "large")
        .link(tar::EntryType::Link, "dangling", "nothing")
        .raw(special("null", tar::EntryType::Char, 1, 3), b"")
        .raw(special("disk", tar::EntryType::Block, 8, 1), b"")
        .raw(special("pipe", tar::EntryType::Fifo, 0, 0), b"")
        .file("bin/.wh.gone", "")
        .file("etc/.wh..wh..opq", "")
        .file(".wh..wh.plnk/1.2", noise(6, 5000))
        .file("d/ä", noise(7, 65_536))
        .file("last", noise(8, 10))
}

struct Streamed {
    toc: Toc,
    device: Vec<u8>,
}

/// Reads a tar as a pass does.
fn streamed(tar: &[u8]) -> Streamed {
    let mut reader = TarReader::new(Limits::default());
    let mut device = Vec::new();
    let mut put = |offset: u64, bytes: &[u8]| {
        device.resize(offset as usize, 0);
        device.extend_from_slice(bytes);
    };
    reader.push(tar, &mut put).unwrap();
    let toc = reader.finish().unwrap().toc.unpack().unwrap();
    device.resize(toc.device_size as usize, 0);
    Streamed { toc, device }
}

fn descriptor(blob: &CarriedBlob) -> Descriptor {
    serde_json::from_value(blob.descriptor()).unwrap()
}

/// Reads the table of a blob, as a mount fetches it. Returns how many bytes were fetched.
fn fetched(blob: &CarriedBlob) -> Result<(CarriedTables, usize), CarriedError> {
    let table = TableRef::of(&descriptor(blob))?.expect("the blob has a table");
    let bytes = &blob.blob.bytes;
    let first = table.first_range();
    let place = table.table_range(&bytes[first.start as usize..first.end as usize])?;
    assert_eq!(place, blob.table.start as u64..blob.table.end as u64);
    let fetched = first.start.min(place.start)..first.end;
    let tables = table.read(place.clone(), &bytes[place.start as usize..place.end as usize])?;
    Ok((tables, (fetched.end - fetched.start) as usize))
}

fn read(blob: &CarriedBlob) -> Result<CarriedTables, CarriedError> {
    Ok(fetched(blob)?.0)
}

fn entries(toc: &PackedToc) -> Vec<TocEntry> {
    toc.unpack().unwrap().entries
}

fn spans(blob: &CarriedBlob, tables: CarriedTables) -> ChunkSpans {
    let layer = blob.blob.digest();
    ChunkSpans::new(layer, tables.chunks, tables.tables.extents).expect("both are of the same layer")
}

/// Decodes a range of spans from its bytes, in pieces of `step` bytes. Calls `sink` with each.
fn decode(map: &dyn SpanMap, blob: &[u8], range: std::ops::Range<u32>, step: usize, sink: &mut dyn FnMut(u32, &[u8])) {
    let bytes = map.blob_range(range.clone());
    let mut decoder = map.decoder(range, Box::new(|_, _| Ok(()))).unwrap();
    for piece in blob[bytes.start as usize..bytes.end as usize].chunks(step) {
        assert!(!decoder.is_done());
        decoder.push(piece, sink).unwrap();
        if decoder.is_done() {
            return;
        }
    }
    panic!("the range is too short");
}

fn writers() -> Vec<Writer> {
    let mut writers: Vec<Writer> = Dialect::ALL.map(Writer::new).into();
    for dialect in Dialect::ALL {
        writers.push(Writer {
            chunk: 50_000,
            ..Writer::new(dialect)
        });
    }
    for share in [4096, 1 << 20] {
        writers.push(Writer {
            chunk: 70_000,
            share,
            ..Writer::new(Dialect::Estargz)
        });
    }
    writers
}

#[test]
fn a_table_says_what_a_pass_finds() {
    let tar = tar().finish();
    let expected = streamed(&tar);
    for writer in writers() {
        let blob = writer.write(&tar);
        let (tables, _) = fetched(&blob).unwrap();
        assert_eq!(
            entries(&tables.tables.toc),
            expected.toc.entries,
            "{:?}",
            writer.dialect
        );
        assert_eq!(tables.tables.toc.device_size(), expected.toc.device_size);
        let mut file = Vec::new();
        tables.chunks.write(&mut file).unwrap();
        assert_eq!(ChunkTable::open(&file).unwrap(), tables.chunks);
    }
}

#[test]
fn chunks_have_the_content_of_the_device() {
    let tar = tar().finish();
    let expected = streamed(&tar);
    for writer in writers() {
        let blob = writer.write(&tar);
        let map = spans(&blob, read(&blob).unwrap());
        let what = (writer.dialect, writer.chunk, writer.share);
        assert_eq!(map.device_size(), expected.device.len() as u64);
        let mut device = vec![0; expected.device.len()];
        let mut delivered = Vec::new();
        // All at once, in small pieces, and each group alone.
        for step in [usize::MAX, 999] {
            decode(&map, &blob.blob.bytes, 0..map.span_count(), step, &mut |span, bytes| {
                delivered.push(span);
                assert_eq!(map.decoded_size(span), bytes.len() as u64);
                for piece in map.pieces(span) {
                    let place = piece.device as usize..(piece.device + piece.len) as usize;
                    device[place].copy_from_slice(&bytes[piece.span as usize..][..piece.len as usize]);
                }
            });
            assert!(device == expected.device, "{what:?}, pieces of {step}");
            assert!(std::mem::take(&mut delivered).into_iter().eq(0..map.span_count()));
        }
        for span in 0..map.span_count() {
            let group = map.group(span);
            assert!(group.contains(&span) && map.restart_for(span) == group.start);
            let mut found = None;
            decode(&map, &blob.blob.bytes, group.start..span + 1, 4096, &mut |at, bytes| {
                found = (at == span).then(|| bytes.to_vec());
            });
            let place = map.device_range(span);
            assert!(found.is_some_and(|bytes| expected.device[place.start as usize..].starts_with(&bytes)));
        }
        let zeros = map.extents().iter().map(|extent| extent.len).sum::<u64>();
        let all = expected.toc.extents.iter().map(|extent| extent.len).sum::<u64>();
        let has_holes =
            matches!(writer.dialect, Dialect::Containers | Dialect::OldContainers) && writer.chunk < 1 << 20;
        assert_eq!(all - zeros, if has_holes { 200_000 } else { 0 }, "{what:?}");
    }
}

#[test]
fn a_table_takes_one_request_or_two() {
    // The tables of many small files are larger than what is fetched first.
    let tar = (0..3000).fold(Tar::new(), |tar, i| tar.file(format!("f{i}"), noise(i, 50)));
    let tar = tar.finish();
    for dialect in Dialect::ALL {
        let blob = Writer::new(dialect).write(&tar);
        let (_, bytes) = fetched(&blob).unwrap();
        let needed = blob.table.len() + if dialect == Dialect::Estargz { 51 } else { 0 };
        assert_eq!(bytes, needed, "{dialect:?}");
    }
}

#[test]
fn a_damaged_chunk_is_not_delivered() {
    let tar = tar().finish();
    for dialect in Dialect::ALL {
        let blob = Writer {
            chunk: 50_000,
            ..Writer::new(dialect)
        }
        .write(&tar);
        let map = spans(&blob, read(&blob).unwrap());
        for span in 0..map.span_count() {
            let group = map.group(span);
            let range = map.blob_range(group.start..span + 1);
            let good = &blob.blob.bytes[range.start as usize..range.end as usize];
            for at in [0, 12, good.len() / 2, good.len() - 1] {
                let mut damaged = good.to_vec();
                damaged[at.min(good.len() - 1)] ^= 0x10;
                let mut decoder = map.decoder(group.start..span + 1, Box::new(|_, _| Ok(()))).unwrap();
                let mut check = |at: u32, bytes: &[u8]| {
                    let mut right = false;
                    decode(
                        &map,
                        &blob.blob.bytes,
                        group.start..at + 1,
                        usize::MAX,
                        &mut |other, expected| {
                            right |= other == at && expected == bytes;
                        },
                    );
                    assert!(right, "{dialect:?}: span {at}");
                };
                let _ = decoder.push(&damaged, &mut check);
            }
        }
    }
}

#[test]
fn the_content_before_the_landmark_is_recommended() {
    let tar = Tar::new()
        .file("first", noise(1, 5000))
        .file(".prefetch.landmark", [15])
        .file("second", noise(2, 5000))
        .finish();
    let none = Tar::new()
        .file(".no.prefetch.landmark", [15])
        .file("first", noise(1, 5000))
        .finish();
    for dialect in [Dialect::Estargz, Dialect::StargzZstd] {
        let tables = read(&Writer::new(dialect).write(&tar)).unwrap();
        assert_eq!(tables.chunks.first(), 8192, "{dialect:?}");
        assert_eq!(read(&Writer::new(dialect).write(&none)).unwrap().chunks.first(), 0);
    }
}

/// Returns the error for a table with changed entries.
fn refusal(what: &str, dialect: Dialect, change: impl Fn(&mut Vec<Value>) + 'static) -> CarriedError {
    let tar = tar().finish();
    let blob = Writer {
        chunk: 50_000,
        change: Box::new(change),
        ..Writer::new(dialect)
    }
    .write(&tar);
    match read(&blob) {
        Err(error) => error,
        Ok(_) => panic!("{dialect:?}, {what}: the table was accepted"),
    }
}

/// Returns the entry with this name.
fn entry<'a>(entries: &'a mut [Value], name: &str) -> &'a mut Value {
    entries.iter_mut().find(|entry| entry["name"] == name).unwrap()
}

#[test]
fn what_a_table_must_not_say_makes_it_useless() {
    let set = |name: &'static str, key: &'static str, value: Value| {
        Box::new(move |entries: &mut Vec<Value>| entry(entries, name)[key] = value.clone()) as Change
    };
    let cases = |dialect| {
        let mut cases = vec![
            ("size", set("large", "size", json!(-1))),
            ("size", set("large", "size", json!(i64::MAX))),
            ("fewer", set("large", "size", json!(99_999))),
            ("offset", set("large", "offset", json!(-5))),
            ("backward", set("large", "offset", json!(1))),
            ("outside", set("last", "offset", json!(1i64 << 40))),
            ("chunk", set("large", "chunkSize", json!(1))),
            ("chunk", set("large", "chunkSize", json!(-1))),
            ("digest", set("large", "chunkDigest", Value::Null)),
            ("digest", set("large", "chunkDigest", json!("sha256:zz"))),
            (
                "digest",
                set(
                    "large",
                    "chunkDigest",
                    json!(Digest::of(b"").to_string().replace("sha256", "sha512")),
                ),
            ),
            ("type", set("large", "chunkType", json!("other"))),
            ("kind", set("pipe", "type", json!("door"))),
            ("kind", set("bin/", "type", json!("chunk"))),
            ("lost", set("small-1", "name", json!("small\u{fffd}"))),
            ("lost", set("link", "linkName", json!("\u{fffd}"))),
            ("lost", set("small-2", "xattrs", json!({"user.\u{fffd}": ""}))),
            ("base64", set("small-2", "xattrs", json!({"user.a": "%"}))),
            ("twice", set("small-1", "name", json!("./small-2"))),
            ("twice", set("small-1", "name", json!("x/../bin"))),
            ("time", set("small-1", "modtime", json!("yesterday"))),
            ("nul", set("small-1", "name", json!("a\0b"))),
            ("long", set("small-1", "name", json!("a".repeat(256)))),
            ("long", set("link", "linkName", json!("a/".repeat(3000)))),
            ("swap", Box::new(|entries: &mut Vec<Value>| entries.reverse()) as _),
        ];
        if matches!(dialect, Dialect::Containers | Dialect::OldContainers) {
            cases.push(("more", set("large", "size", json!(300_001))));
            cases.push(("end", set("small-1", "endOffset", json!(0))));
            cases.push(("end", set("last", "endOffset", json!(1i64 << 40))));
            cases.push(("end", set("small-1", "endOffset", json!(i64::MIN))));
        } else {
            cases.push(("inner", set("small-1", "innerOffset", json!(-1))));
            cases.push(("inner", set("small-1", "innerOffset", json!(i64::MAX))));
        }
        cases
    };
    for dialect in Dialect::ALL {
        for (what, change) in cases(dialect) {
            let error = refusal(what, dialect, change);
            assert!(!error.is_damage(), "{dialect:?}, {what}: {error}");
        }
    }
}

#[test]
fn a_chunk_without_a_digest_is_not_used() {
    for dialect in Dialect::ALL {
        let error = refusal("no digest", dialect, |entries| {
            for key in ["chunkDigest", "digest"] {
                entry(entries, "small-1")[key] = Value::Null;
            }
        });
        assert!(error.to_string().contains("without a digest"), "{error}");
    }
}

#[test]
fn entries_that_a_tar_could_have_are_read_as_in_a_tar() {
    let blob = Writer {
        change: Box::new(|entries| {
            entry(entries, "null")["devMajor"] = json!(-1);
            entry(entries, "small-1")["uid"] = json!(-2);
            entry(entries, "small-1")["mode"] = json!(-1);
            entry(entries, "link")["name"] = json!("../../up/./link");
            entry(entries, "last")["modtime"] = json!("1969-12-31T23:59:59.5Z");
            entry(entries, "d/ä")["modtime"] = json!("0001-01-01T00:00:00Z");
            entry(entries, "hard")["linkName"] = json!("hard");
        }),
        ..Writer::new(Dialect::Containers)
    }
    .write(&tar().finish());
    let entries = entries(&read(&blob).unwrap().tables.toc);
    let find = |path: &str| entries.iter().find(|entry| *entry.path == *path.as_bytes()).unwrap();
    assert!(matches!(find("null").kind, EntryKind::CharDevice(number) if number.major == 0xfff));
    assert_eq!(
        (find("small-1").meta.uid, find("small-1").meta.mode),
        (u32::MAX - 1, 0o7777)
    );
    assert!(matches!(find("up/link").kind, EntryKind::Symlink(_)));
    assert_eq!(
        (find("last").meta.mtime, find("last").meta.mtime_nsec),
        (-1, 500_000_000)
    );
    assert_eq!(find("d/ä").meta.mtime, 0);
}

#[test]
fn a_table_that_does_not_match_is_damage() {
    let tar = tar().finish();
    for dialect in Dialect::ALL {
        let good = Writer::new(dialect).write(&tar);
        for key in good.annotations.keys().filter(|key| !key.ends_with("position")) {
            let mut other = good.clone();
            other.annotations.insert(key.clone(), Digest::of(b"other").to_string());
            let error = read(&other).unwrap_err();
            assert!(error.is_damage(), "{dialect:?}, {key}: {error}");
        }
        for at in good.table.clone() {
            let mut damaged = good.clone();
            damaged.blob.bytes[at] ^= 1;
            let Err(error) = read(&damaged) else {
                // Some bytes of a gzip header and of padding say nothing.
                assert_eq!(dialect, Dialect::Estargz);
                continue;
            };
            assert!(error.is_damage(), "{dialect:?}, {at}: {error}");
        }
    }
}

#[test]
fn a_footer_must_point_into_the_blob() {
    let good = Writer::new(Dialect::Estargz).write(&tar().finish());
    let end = good.blob.bytes.len();
    for table in [end - 51, end, usize::MAX] {
        let mut blob = good.clone();
        blob.blob.bytes.truncate(end - 51);
        blob.blob.bytes.extend(crate::common::carried::footer(table));
        let error = TableRef::of(&descriptor(&blob))
            .unwrap()
            .unwrap()
            .table_range(&blob.blob.bytes);
        assert!(error.is_err_and(|error| !error.is_damage()), "{table}");
    }
    let mut blob = good.clone();
    blob.annotations.remove(STARGZ_DIGEST);
    assert_eq!(TableRef::of(&descriptor(&blob)), Ok(None));
}

/// Returns a blob whose table is this JSON, which need not be JSON at all.
fn with_json(dialect: Dialect, json: &[u8]) -> CarriedBlob {
    let packed = zstd::encode_all(json, 1).unwrap();
    let mut blob = Writer::new(dialect).write(&Tar::new().finish());
    let content = vec![0; 1 << 20];
    let (start, end) = (content.len(), content.len() + packed.len());
    for (key, value) in &mut blob.annotations {
        *value = match key {
            key if key.ends_with("position") => format!("{start}:{}:1000:1", packed.len()),
            key if key.ends_with("checksum") => Digest::of(&packed).to_string(),
            _ => Digest::of(json).to_string(),
        };
    }
    (blob.blob.bytes, blob.table) = ([content, packed].concat(), start..end);
    blob
}

#[test]
fn a_bomb_is_not_unpacked() {
    // A megabyte of spaces for every kilobyte of table, and names without end.
    let around = |head: &str, filling: u8, len: usize, end: &str| {
        [head.as_bytes(), &vec![filling; len], end.as_bytes()].concat()
    };
    let spaces = around("{\"version\":1,\"entries\":[", b' ', 300 << 20, "]}");
    let name = around("{\"version\":1,\"entries\":[{\"name\":\"", b'a', 100 << 20, "\"}]}");
    for json in [spaces, name] {
        let error = read(&with_json(Dialect::Containers, &json)).unwrap_err();
        assert!(matches!(error, CarriedError::Malformed { .. }), "{error}");
    }
}

#[test]
fn any_table_is_survived() {
    let mut random = fastrand::Rng::with_seed(11);
    let mut accepted = 0;
    for dialect in [Dialect::Containers, Dialect::StargzZstd] {
        let writer = Writer {
            chunk: 50_000,
            ..Writer::new(dialect)
        };
        let good = writer.write(&tar().finish());
        let json = zstd::decode_all(&good.blob.bytes[good.table]).unwrap();
        for _ in 0..3000 {
            let mut changed = json.clone();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..changed.len());
                match random.u8(..4) {
                    0 => changed[at] = random.u8(..),
                    // Other numbers and other names.
                    1 => changed[at] = b'0' + random.u8(..10),
                    2 => drop(changed.drain(at..changed.len().min(at + random.usize(1..40)))),
                    _ => changed
                        .splice(at..at, json[at / 2..][..7].iter().copied())
                        .for_each(drop),
                }
            }
            let blob = with_json(dialect, &changed);
            if let Ok(tables) = read(&blob) {
                accepted += 1;
                assert!(tables.tables.toc.unpack().is_ok());
                let map = spans(&blob, tables);
                for span in 0..map.span_count() {
                    assert!(map.group(span).contains(&span));
                    assert!(map.blob_range(span..span + 1).end <= blob.table.start as u64);
                    assert!(map.pieces(span).iter().all(|p| p.device + p.len <= map.device_size()));
                }
            }
        }
    }
    assert!(accepted > 100, "only {accepted} of the tables were read at all");
}
