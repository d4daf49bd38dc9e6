use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::index::{BitPosition, Compression, DecodeSink as _, Identity, SpanId, SpanIndexBuilder, SpanStart};
use crate::oci::{DiffId, Digest};
use crate::store::{Durability, Store};
use crate::toc::{Limits, TarReader};

const SPAN: u64 = 8192;

fn layer_dir(root: &Path) -> LayerDir {
    let store = Store::open(root).unwrap();
    store.layer(&Digest::of(b"layer")).unwrap()
}

fn shape_of(spans: u32) -> Shape {
    Shape {
        size: u64::from(spans) * SPAN,
        spans,
        key: [9; 16],
    }
}

fn open(root: &Path, spans: u32) -> DataDevice {
    let store = Store::open(root).unwrap();
    DataDevice::open_or_create(&store, &layer_dir(root).data(), shape_of(spans)).unwrap()
}

/// The map as another process has it.
fn map(root: &Path, spans: u32) -> Arc<PresenceMap> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(layer_dir(root).data())
        .unwrap();
    Arc::new(PresenceMap::open(file, shape_of(spans)).unwrap().unwrap())
}

fn piece(span: u32) -> [Piece; 1] {
    [Piece {
        span: 512,
        device: u64::from(span) * SPAN,
        len: 4096,
    }]
}

/// A span's uncompressed bytes: a tar header, then content.
fn bytes(span: u32) -> Vec<u8> {
    let content = |i: usize| (i as u32).wrapping_mul(span + 1) as u8 | 1;
    (0..SPAN as usize).map(content).collect()
}

fn content(span: u32) -> Vec<u8> {
    bytes(span)[512..512 + 4096].to_vec()
}

fn fill(device: &DataDevice, span: u32) {
    let (lock, _) = device.try_lock(&[span]).unwrap();
    device.fill(&lock, span, &piece(span), &bytes(span)).unwrap();
}

fn read(device: &DataDevice, span: u32) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    let present = device
        .read(span..span + 1, u64::from(span) * SPAN, &mut buffer)
        .unwrap();
    present.then_some(buffer)
}

#[test]
fn what_is_filled_is_read_by_another_opener() {
    let root = tempfile::tempdir().unwrap();
    let a = open(root.path(), 4);
    let b = open(root.path(), 4);
    assert_eq!(read(&b, 2), None);
    fill(&a, 2);
    assert_eq!(read(&b, 2), Some(content(2)));
    assert_eq!(((0..4).filter(|&s| !b.is_absent(s)).count(), read(&b, 3)), (1, None));
}

#[test]
fn a_device_of_another_index_is_replaced() {
    let root = tempfile::tempdir().unwrap();
    let old = open(root.path(), 4);
    fill(&old, 1);
    let new = open(root.path(), 5);
    assert_eq!((read(&new, 1), read(&old, 1)), (None, Some(content(1))));
    let store = Store::open(root.path()).unwrap();
    let other_key = Shape {
        key: [1; 16],
        ..shape_of(5)
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
fn after_a_restart_a_checksum_decides() {
    let root = tempfile::tempdir().unwrap();
    let device = open(root.path(), 4);
    fill(&device, 1);
    fill(&device, 2);
    drop(device);
    // Another boot id, and a block that never reached the disk.
    let file = File::options().write(true).open(layer_dir(root.path()).data()).unwrap();
    file.write_all_at(&[7; 16], shape_of(4).tail() + 16).unwrap();
    file.write_all_at(&[0; 4096], 2 * SPAN).unwrap();
    let device = open(root.path(), 4);
    assert!(device.is_unchecked(1) && device.is_unchecked(2) && !device.is_unchecked(3));
    assert_eq!((read(&device, 1), read(&device, 2)), (None, None));
    for span in [1, 2] {
        device.check(span, &piece(span)).unwrap();
    }
    assert_eq!((read(&device, 1), read(&device, 2)), (Some(content(1)), None));
}

#[test]
fn a_whole_device_written_in_order_reads_back() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let mut writer = DataDevice::create(&store, &layer_dir(root.path())).unwrap();
    for span in 0..300 {
        writer.write(u64::from(span) * SPAN, &content(span)).unwrap();
    }
    let crcs: Vec<u32> = (0..300).map(|s| crc32fast::hash(&content(s))).collect();
    let device = writer.finish_as(shape_of(300), &crcs).unwrap();
    assert!((0..300).all(|s| read(&device, s) == Some(content(s))));
    let other = open(root.path(), 300);
    assert!((0..300).all(|s| read(&other, s) == Some(content(s))));
}

/// Readers see a span's bytes or nothing, while it is filled and evicted as fast as it goes.
#[test]
fn a_reader_never_sees_a_hole() {
    let root = tempfile::tempdir().unwrap();
    let device = open(root.path(), 1);
    let evictor = map(root.path(), 1);
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
            let _lock = evictor.try_lock_one(0).unwrap().unwrap();
            assert!(evictor.evict(0));
            let mode =
                nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
            nix::fcntl::fallocate(evictor.file(), mode, 0, 4096).unwrap();
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
    let b = map(root.path(), 8);
    let lock = a.try_lock(&[1, 2, 5]).unwrap();
    let free = |span| b.try_lock_one(span).unwrap().is_some();
    assert_eq!([0, 1, 2, 3, 5, 6].map(free), [true, false, false, true, false, true]);
    drop(lock);
    assert!([1, 2, 5].into_iter().all(free));
}

/// A layer of `count` files that fill one span each, indexed, with all spans on its device: the device and where its map is.
fn full_layer(store: &Store, name: &[u8], count: u32) -> (DataDevice, LayerDir, u64) {
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
    let extents = reader.finish().unwrap().extent_table();
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
        .publish(&dir.extents(), lazy, |file| extents.encode(file))
        .unwrap();
    store.publish(&dir.spans(), lazy, |file| index.write(file)).unwrap();
    let device = DataDevice::open(store, &dir, &index, extents.device_size()).unwrap();
    for span in 0..count {
        let (lock, _) = device.try_lock(&[span]).unwrap();
        let piece = Piece {
            span: 512,
            device: u64::from(span) * SPAN,
            len: SPAN - 512,
        };
        device.fill(&lock, span, &[piece], &bytes(span)).unwrap();
    }
    (device, dir, shape(&index, extents.device_size()).tail())
}

#[test]
fn the_least_recently_used_spans_of_all_layers_go_first() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let layers = [full_layer(&store, b"one", 6), full_layer(&store, b"two", 6)];
    // When the spans were last used, in no order; some time ago, or a read would not count as a use.
    let stamps = [[50, 10, 90, 30, 70, 110], [100, 60, 20, 120, 40, 80]];
    for ((_, dir, tail), stamps) in layers.iter().zip(stamps) {
        let file = File::options().write(true).open(dir.data()).unwrap();
        for (span, stamp) in (0..).zip(stamps) {
            file.write_all_at(&u64::to_le_bytes(stamp), tail + 64 + 16 * span + 8)
                .unwrap();
        }
    }
    let present = || {
        let mut present = Vec::new();
        for ((device, ..), stamps) in layers.iter().zip(stamps) {
            present.extend((0..6).filter(|&s| device.is_present(s)).map(|s| stamps[s as usize]));
        }
        present.sort_unstable();
        present
    };
    let usage = || layers.iter().map(|(_, dir, _)| dir.data_usage()).sum::<u64>();
    assert_eq!(present().len(), 12);
    let evicted = evict_to(&store, usage() - 5 * SPAN).unwrap();
    assert_eq!((evicted.spans, evicted.before - evicted.after), (5, 5 * SPAN));
    assert_eq!(present(), [60, 70, 80, 90, 100, 110, 120]);
    // A use counts: the oldest one that is left becomes the youngest.
    assert!(read(&layers[1].0, 1).is_some());
    evict_to(&store, usage() - 2 * SPAN).unwrap();
    assert_eq!(present(), [60, 90, 100, 110, 120]);
    for ((device, ..), stamps) in layers.iter().zip(stamps) {
        for (span, stamp) in (0..6).zip(stamps) {
            let kept = present().contains(&stamp);
            assert_eq!(read(device, span), kept.then(|| content(span)), "{stamp}");
        }
    }
}
