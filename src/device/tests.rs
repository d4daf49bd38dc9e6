use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::index::{BitPosition, Compression, DecodeSink as _, Identity, SpanId, SpanIndexBuilder, SpanStart};
use crate::oci::{DiffId, Digest};
use crate::span::IndexedSpans;
use crate::store::{Durability, Store};
use crate::toc::{DEVICE_BLOCK, Limits, TarReader};

const SPAN: u64 = 8192;

fn layer_dir(root: &Path) -> LayerDir {
    let store = Store::open(root).unwrap();
    store.layer(&Digest::of(b"layer")).unwrap()
}

fn geometry_of(spans: u32) -> Geometry {
    let heads: Vec<u64> = (0..u64::from(spans)).map(|span| span * SPAN).collect();
    geometry::tests::geometry(u64::from(spans) * SPAN / DEVICE_BLOCK, &heads)
}

fn open(root: &Path, spans: u32) -> DataDevice {
    let store = Store::open(root).unwrap();
    DataDevice::open_or_create(&store, &layer_dir(root).data(), geometry_of(spans)).unwrap()
}

/// Opens the file as another process does.
fn other(root: &Path, spans: u32) -> Arc<DeviceFile> {
    let opened = DeviceFile::open(raw(root), &layer_dir(root).data(), true, geometry_of(spans));
    Arc::new(opened.unwrap().unwrap())
}

/// Opens the file as any program may open it.
fn raw(root: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(layer_dir(root).data())
        .unwrap()
}

/// Returns a budget that is never used up.
fn plenty(store: &Store) -> Arc<CacheBudget> {
    CacheBudget::new(store.clone(), 1 << 40)
}

fn piece(span: u32) -> [Piece; 1] {
    [Piece {
        span: 512,
        device: u64::from(span) * SPAN,
        len: 4096,
    }]
}

/// Returns a span's uncompressed bytes: a tar header, then content.
fn bytes(span: u32) -> Vec<u8> {
    let content = |i: usize| (i as u32).wrapping_mul(span + 1) as u8 | 1;
    (0..SPAN as usize).map(content).collect()
}

fn content(span: u32) -> Vec<u8> {
    bytes(span)[512..512 + 4096].to_vec()
}

fn fill(device: &DataDevice, span: u32) {
    let (lock, _) = device.try_lock(&[span]).unwrap();
    assert!(device.fill(&lock, span, &piece(span), &bytes(span)).unwrap());
}

fn find(device: &DataDevice, span: u32, buffer: &mut [u8]) -> Found {
    // The first 4096 bytes of each span's 8192 are content.
    let has_content = |range: Range<u64>| range.start % SPAN < 4096;
    device.read(u64::from(span) * SPAN, buffer, has_content).unwrap()
}

fn read(device: &DataDevice, span: u32) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    match find(device, span, &mut buffer) {
        Found::Bytes => Some(buffer),
        Found::Absent => None,
        Found::Damaged(span) => panic!("{span} is damaged"),
    }
}

fn present(device: &DataDevice, span: u32) -> bool {
    device.is_present(span).unwrap()
}

#[test]
fn what_is_filled_is_read_by_another_opener() {
    let root = tempfile::tempdir().unwrap();
    let a = open(root.path(), 4);
    let b = open(root.path(), 4);
    assert_eq!(read(&b, 2), None);
    fill(&a, 2);
    assert_eq!(read(&b, 2), Some(content(2)));
    assert_eq!(b.present(0..4).unwrap(), [false, false, true, false]);
    assert_eq!(read(&b, 3), None);
}

#[test]
fn a_device_of_another_index_is_replaced() {
    let root = tempfile::tempdir().unwrap();
    let old = open(root.path(), 4);
    fill(&old, 1);
    let new = open(root.path(), 5);
    assert_eq!((read(&new, 1), read(&old, 1)), (None, Some(content(1))));
    let store = Store::open(root.path()).unwrap();
    let other_key = Geometry {
        key: [1; 32],
        ..geometry_of(5)
    };
    fill(&new, 2);
    let newest = DataDevice::open_or_create(&store, &layer_dir(root.path()).data(), other_key).unwrap();
    assert_eq!(read(&newest, 2), None);
}

#[test]
fn whatever_is_deleted_or_cut_nothing_missing_is_believed() {
    let root = tempfile::tempdir().unwrap();
    let path = layer_dir(root.path()).data();
    fill(&open(root.path(), 4), 2);
    assert_eq!(read(&open(root.path(), 4), 2), Some(content(2)));
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(3 * SPAN)
        .unwrap();
    assert_eq!(read(&open(root.path(), 4), 2), None);
    fill(&open(root.path(), 4), 2);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(read(&open(root.path(), 4), 2), None);
}

#[test]
fn damage_is_found_by_the_reader_and_healed_by_filling_again() {
    let root = tempfile::tempdir().unwrap();
    let device = open(root.path(), 4);
    let file = raw(root.path());
    let records = (64 << 10) + 128 + 4 * 8;
    let checks = records + 4 * 16;
    // Place of the damage, the bytes written there, and whether that harms span 2.
    let damages: [(u64, &[u8], bool); 6] = [
        (2 * SPAN + 77, &[0xfe], true),
        (2 * SPAN, &[0; 4096], true),
        (checks + 4 * 4, &[1, 2, 3, 4], true),
        (checks + 4 * 4, &[0; 4], true),
        // Two changes that do no harm: in the other half of the span, which is a gap, and in the records.
        (2 * SPAN + 4096, &[9; 100], false),
        (records + 2 * 16, &[0; 16], false),
    ];
    for (at, damage, harms) in damages {
        for span in 0..4 {
            fill(&device, span);
        }
        file.write_all_at(damage, at).unwrap();
        let mut buffer = vec![0; 8192];
        let found = find(&device, 2, &mut buffer);
        match harms {
            true => assert_eq!(found, Found::Damaged(2), "{at}"),
            false => {
                assert_eq!(found, Found::Bytes, "{at}");
                assert!(buffer[..4096] == content(2) && buffer[4096..] == [0; 4096]);
            }
        }
        assert!(
            [0, 1, 3]
                .into_iter()
                .all(|span| read(&device, span) == Some(content(span)))
        );
        let (lock, _) = device.try_lock(&[2]).unwrap();
        device.drop_span(&lock, 2).unwrap();
        drop(lock);
        assert_eq!((present(&device, 2), read(&device, 2)), (false, None));
        fill(&device, 2);
        assert_eq!(read(&device, 2), Some(content(2)));
    }
    file.set_len(2 * SPAN).unwrap();
    let cut = device.read(2 * SPAN, &mut [0; 4096], |_| true).unwrap_err();
    assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn parts_of_blocks_are_read_before_their_neighbours_are_there() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let path = layer_dir(root.path()).data();
    // All of the device is content, and spans begin anywhere.
    let heads = [0, 5000, 5010, 9000, 20_000];
    let geometry = geometry::tests::geometry(8, &heads);
    let whole: Vec<u8> = (0..geometry.size).map(|i| (i % 251) as u8 | 1).collect();
    for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]] {
        gone(std::fs::remove_file(&path)).unwrap();
        let device = DataDevice::open_or_create(&store, &path, geometry.clone()).unwrap();
        let mut there = Vec::new();
        for span in order {
            let range = geometry.range(span);
            let bytes = &whole[range.start as usize..range.end as usize];
            let piece = Piece {
                span: 0,
                device: range.start,
                len: bytes.len() as u64,
            };
            let (lock, _) = device.try_lock(&[span]).unwrap();
            assert!(device.fill(&lock, span, &[piece], bytes).unwrap());
            there.push(span);
            for (start, end) in [
                (0, 100),
                (4096, 4097),
                (4999, 5000),
                (5000, 5010),
                (5003, 9001),
                (8192, 8999),
                (100, 32_768),
            ] {
                let mut buffer = vec![0; (end - start) as usize];
                let found = device.read(start, &mut buffer, |_| true).unwrap();
                let all = geometry.spans_of(start..end).all(|span| there.contains(&span));
                assert_eq!(
                    found,
                    if all { Found::Bytes } else { Found::Absent },
                    "{order:?} {start} {end}"
                );
                assert!(!all || buffer == whole[start as usize..end as usize]);
            }
        }
    }
}

#[test]
fn a_whole_device_written_in_order_reads_back() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let budget = plenty(&store);
    let mut writer = DataDevice::create(&store, &layer_dir(root.path())).unwrap();
    for span in 0..300 {
        writer.span(span);
        assert!(writer.write(u64::from(span) * SPAN, &content(span), &budget).unwrap());
    }
    let device = writer.finish_as(geometry_of(300), &budget).unwrap().unwrap();
    assert!((0..300).all(|s| read(&device, s) == Some(content(s))));
    let other = open(root.path(), 300);
    assert!((0..300).all(|s| present(&other, s) && read(&other, s) == Some(content(s))));
}

#[test]
fn a_device_without_room_is_not_finished() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let budget = CacheBudget::new(store.clone(), 4 << 20);
    let mut writer = DataDevice::create(&store, &layer_dir(root.path())).unwrap();
    let mut span = 0;
    while writer.write(u64::from(span) * SPAN, &content(span), &budget).unwrap() {
        span += 1;
        assert!(span < 1500);
    }
    drop(writer);
    assert!(!layer_dir(root.path()).data().exists());
    assert_eq!(store.cache_usage().unwrap(), 0);
}

/// A reader sees a span's bytes or none, while other threads fill and evict the span as fast as they can.
#[test]
fn a_reader_never_sees_a_hole() {
    let root = tempfile::tempdir().unwrap();
    let device = open(root.path(), 1);
    let evictor = other(root.path(), 1);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = 0u32;
            while !done.load(Ordering::Relaxed) {
                if let Some(found) = read(&device, 0) {
                    assert_eq!(found, content(0));
                    seen += 1;
                }
            }
            seen
        });
        for _ in 0..3000 {
            fill(&device, 0);
            assert!(evict::evict_span(&evictor, 0).unwrap().is_some());
        }
        fill(&device, 0);
        while read(&device, 0).is_none() {}
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}

#[test]
fn a_span_that_is_being_filled_cannot_be_locked_by_another_opener() {
    let root = tempfile::tempdir().unwrap();
    let a = open(root.path(), 8);
    let b = other(root.path(), 8);
    let lock = a.try_lock(&[1, 2, 5]).unwrap();
    let free = |span| b.try_lock_one(span).unwrap().is_some();
    assert_eq!([0, 1, 2, 3, 5, 6].map(free), [true, false, false, true, false, true]);
    drop(lock);
    assert!([1, 2, 5].into_iter().all(free));
}

/// Makes an indexed layer of `count` files that fill one span each. All spans are on its device.
fn full_layer(store: &Store, name: &[u8], count: u32) -> (DataDevice, LayerDir) {
    let mut tar = tar::Builder::new(Vec::new());
    for file in 0..count {
        let mut header = tar::Header::new_ustar();
        header.set_size(SPAN - 512);
        header.set_mode(0o644);
        let content = &bytes(file)[512..];
        tar.append_data(&mut header, format!("{file}"), content).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let mut reader = TarReader::new(Limits::default());
    reader.push(&tar, &mut |_, _| ()).unwrap();
    let extents = reader.finish().unwrap().extents;
    let mut builder = SpanIndexBuilder::new(Compression::Tar).unwrap();
    for (span, bytes) in (0..count).zip(tar.chunks(SPAN as usize)) {
        let offset = u64::from(span) * SPAN;
        builder.span(SpanStart {
            span: SpanId(span),
            tar_offset: offset,
            position: BitPosition(8 * offset),
            restart: true,
        });
        builder.bytes(bytes);
    }
    let blob = Digest::of(name);
    let identity = Identity {
        blob: blob.clone(),
        blob_size: u64::from(count) * SPAN,
        diff_id: DiffId(blob.clone()),
    };
    let index = builder.finish(identity).unwrap();
    let dir = store.layer(&blob).unwrap();
    let lazy = Durability::Lazy;
    store
        .publish_sealed(&dir.spans(), lazy, |mut file| index.write(&mut file))
        .unwrap();
    let device = DataDevice::open(store, &dir, &IndexedSpans::new(index, extents)).unwrap();
    for span in 0..count {
        let (lock, _) = device.try_lock(&[span]).unwrap();
        let piece = Piece {
            span: 512,
            device: u64::from(span) * SPAN,
            len: SPAN - 512,
        };
        device.fill(&lock, span, &[piece], &bytes(span)).unwrap();
    }
    (device, dir)
}

#[test]
fn the_least_recently_used_spans_of_all_layers_go_first() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let layers = [full_layer(&store, b"one", 6), full_layer(&store, b"two", 6)];
    // The times at which the spans were last used, in no order. They are long ago, so that a read makes its span the
    // youngest.
    let stamps = [[50, 10, 90, 30, 70, 110], [100, 60, 20, 120, 40, 80]];
    for ((_, dir), stamps) in layers.iter().zip(stamps) {
        let file = File::options().write(true).open(dir.data()).unwrap();
        for (span, stamp) in (0..).zip(stamps) {
            let record = 64 * 1024 + 128 + 6 * 8 + 16 * span;
            file.write_all_at(&u64::to_le_bytes(stamp), record + 8).unwrap();
        }
    }
    let left = || {
        let mut found = Vec::new();
        for ((device, _), stamps) in layers.iter().zip(stamps) {
            found.extend((0..6).filter(|&s| present(device, s)).map(|s| stamps[s as usize]));
        }
        found.sort_unstable();
        found
    };
    let usage = || layers.iter().map(|(_, dir)| dir.data_usage()).sum::<u64>();
    assert_eq!(left().len(), 12);
    let evicted = evict_to(&store, usage() - 5 * SPAN, Scope::Data).unwrap();
    assert_eq!((evicted.spans, evicted.before - evicted.after), (5, 5 * SPAN));
    assert_eq!(left(), [60, 70, 80, 90, 100, 110, 120]);
    // A use counts: the oldest span that is left becomes the youngest.
    assert!(read(&layers[1].0, 1).is_some());
    evict_to(&store, usage() - 2 * SPAN, Scope::Data).unwrap();
    assert_eq!(left(), [60, 90, 100, 110, 120]);
    for ((device, _), stamps) in layers.iter().zip(stamps) {
        for (span, stamp) in (0..6).zip(stamps) {
            let kept = left().contains(&stamp);
            assert_eq!(read(device, span), kept.then(|| content(span)), "{stamp}");
        }
    }
}
