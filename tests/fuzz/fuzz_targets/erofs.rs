//! Any bytes as a file system image: errors are fine, panics are bugs, and every question ends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ocifs::erofs::{Nid, Reader};

/// Blocks of the two data devices the image is said to point into.
const DEVICES: [u64; 2] = [3 * 4096, 5 * 4096];

/// Inodes looked at per input: enough for any cycle to come round, few enough to be quick.
const MAX_INODES: usize = 200;

fuzz_target!(|data: &[u8]| {
    if let Ok(reader) = Reader::open(data, &DEVICES) {
        walk(&reader);
    }
    // Few inputs have the right checksum, so give them one.
    let mut image = data.to_vec();
    disguise(&mut image);
    let reader = Reader::open(&image[..], &DEVICES).expect("the superblock is in order");
    walk(&reader);
});

fn walk(reader: &Reader<&[u8]>) {
    let mut todo: Vec<Nid> = vec![reader.root()];
    for _ in 0..MAX_INODES {
        let Some(nid) = todo.pop() else {
            return;
        };
        let size = reader.inode(nid).map_or(0, |inode| inode.size);
        let _ = reader.symlink(nid);
        let _ = reader.xattr(nid, b"user.a");
        let _ = reader
            .xattrs(nid)
            .map(|xattrs| xattrs.map(|xattr| xattr.map(|xattr| xattr.name())).count());
        for offset in [0, 1, 4095, size / 2, size.saturating_sub(1), size, u64::MAX] {
            if let Ok(Some(mapping)) = reader.map(nid, offset) {
                assert!(mapping.bytes() > 0 && mapping.bytes() <= size - offset);
            }
            let _ = reader.entries(nid, offset).map(|entries| entries.take(50).count());
        }
        for entry in reader.entries(nid, 0).into_iter().flatten().take(500).flatten() {
            let _ = reader.lookup(nid, entry.name);
            todo.push(entry.nid);
        }
    }
}

/// Pads to whole blocks and sets the superblock's fields so that the image opens; the root is left to the input.
fn disguise(image: &mut Vec<u8>) {
    image.resize(image.len().max(4096).next_multiple_of(4096), 0);
    let blocks = (image.len() as u64 + DEVICES.iter().sum::<u64>()) / 4096;
    let mut put = |at: usize, bytes: &[u8]| image[1024 + at..][..bytes.len()].copy_from_slice(bytes);
    put(0, &0xE0F5_E1E2u32.to_le_bytes());
    put(4, &[0; 4]);
    put(8, &1u32.to_le_bytes());
    put(12, &[12, 0]);
    put(36, &(blocks as u32).to_le_bytes());
    put(40, &[0; 4]);
    put(80, &[4, 0, 0, 0, 0, 0, 0, 0]);
    put(90, &[0]);
    let crc = image[1024..4096].iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0x82F6_3B78
            } else {
                crc >> 1
            }
        })
    });
    image[1028..1032].copy_from_slice(&crc.to_le_bytes());
}
