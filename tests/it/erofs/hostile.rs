//! Bytes that are not an image, and trees that no image can hold. Both must give errors, never a panic, an endless
//! loop or an answer out of bounds.

use ocifs::erofs::{self, Mapping, Nid, Reader};
use ocifs::oci::Digest;
use ocifs::toc::{DataLayout, FileData, Xattrs};
use ocifs::tree::{LayerIdx, NodeKind, Tree};
use proptest::prelude::*;

use super::image_of;
use super::trees::{self, Builder, Sample};

/// Gives any bytes a valid superblock, so that the reader accepts them and reads what follows.
fn disguise(image: &mut Vec<u8>, device_blocks: u32) {
    image.resize(image.len().max(4096).next_multiple_of(4096), 0);
    let blocks = (image.len() / 4096) as u32 + device_blocks;
    let mut put = |at: usize, bytes: &[u8]| image[1024 + at..][..bytes.len()].copy_from_slice(bytes);
    put(0, &0xE0F5_E1E2u32.to_le_bytes());
    put(4, &[0; 4]);
    put(8, &1u32.to_le_bytes());
    put(12, &[12, 0]);
    put(36, &blocks.to_le_bytes());
    put(40, &[0; 4]);
    put(80, &[4, 0, 0, 0, 0, 0, 0, 0]);
    put(90, &[0]);
    let crc = image[1024..4096].iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 }
        })
    });
    image[1028..1032].copy_from_slice(&crc.to_le_bytes());
}

/// Calls every function of the reader for everything reachable in a bounded number of steps. Mappings must lie within
/// the devices.
fn ask_everything(reader: &Reader<Vec<u8>>, devices: &[u64]) {
    let mut todo = vec![reader.root()];
    for _ in 0..300 {
        let Some(nid) = todo.pop() else {
            return;
        };
        let size = reader.inode(nid).map_or(0, |inode| inode.size);
        let _ = reader.symlink(nid);
        let _ = reader.xattr(nid, b"user.a");
        for offset in [0, 1, 4096, 1 << 20, size.saturating_sub(1), u64::MAX] {
            match reader.map(nid, offset) {
                Ok(Some(Mapping::Hole { len })) => assert!(len > 0 && len <= size - offset),
                Ok(Some(Mapping::Device { layer, offset: at, len })) => {
                    assert!(len > 0 && len <= size - offset);
                    assert!(at + len <= devices[layer.0 as usize]);
                }
                Ok(None) | Err(_) => {}
            }
            let _ = reader.entries(nid, offset).map(|entries| entries.take(100).count());
        }
        for entry in reader.entries(nid, 0).into_iter().flatten().take(4000).flatten() {
            assert!((1..=255).contains(&entry.name.len()));
            let _ = reader.lookup(nid, entry.name);
            todo.push(entry.nid);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn hostile_bytes_give_errors(
        sample in trees::sample(12),
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..20),
    ) {
        let mut image = image_of(&sample);
        for (at, byte) in edits {
            let at = at.index(image.len());
            image[at] = byte;
        }
        let devices = sample.device_sizes();
        let _ = Reader::open(image.clone(), &devices).map(|reader| ask_everything(&reader, &devices));
        let blocks: u64 = devices.iter().map(|size| size / 4096).sum();
        disguise(&mut image, blocks as u32);
        ask_everything(&Reader::open(image, &devices).unwrap(), &devices);
    }
}

#[test]
fn a_directory_as_large_as_a_number_can_be_has_an_end() {
    const ROOT: usize = 120;
    let mut image = vec![0; 8192];
    image[1024 + 14..][..2].copy_from_slice(&(ROOT as u16).to_le_bytes());
    let inode = &mut image[32 * ROOT..];
    // An extended inode of a directory whose last block follows the inode.
    inode[0] = 2 << 1 | 1;
    inode[4..6].copy_from_slice(&0o40755u16.to_le_bytes());
    inode[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    // The name offset of the first entry says that there are two entries.
    inode[64 + 8] = 24;
    disguise(&mut image, 0);
    let reader = Reader::open(image, &[]).unwrap();
    assert_eq!(reader.inode(reader.root()).unwrap().size, u64::MAX);
    for offset in [u64::MAX - 1, u64::MAX - 4096, 0] {
        let entries = reader.entries(reader.root(), offset).unwrap();
        assert!(entries.take(100).count() <= 2, "{offset}");
    }
}

#[test]
fn images_that_are_none_are_refused() {
    let sample = trees::corners();
    let devices = sample.device_sizes();
    let image = image_of(&sample);
    let refused = |image: Vec<u8>, devices: &[u64]| Reader::open(image, devices).unwrap_err().to_string();
    assert!(refused(Vec::new(), &devices).contains("0 bytes"));
    assert!(refused(image[..image.len() - 4096].to_vec(), &devices).contains("bytes instead of"));
    assert!(refused(image.clone(), &devices[1..]).contains("bytes instead of"));
    assert!(refused(image.clone(), &[1 << 50]).contains("fewer than its data devices"));
    let mut other = image.clone();
    other[1024] ^= 1;
    assert!(refused(other, &devices).contains("magic"));
    let mut other = image.clone();
    other[4095] ^= 1;
    assert!(refused(other, &devices).contains("checksum"));
    let reader = Reader::open(image, &devices).unwrap();
    assert!(matches!(
        reader.symlink(reader.root()),
        Err(erofs::ErofsError::WrongType { .. })
    ));
    assert!(matches!(
        reader.inode(Nid(u64::MAX)),
        Err(erofs::ErofsError::Corrupt { .. })
    ));
    assert_eq!(
        reader.device_start(LayerIdx(1)),
        Some(reader.metadata_size() + devices[0])
    );
    assert_eq!(reader.device_start(LayerIdx(3)), None);
    assert_eq!(reader.disk_size(), reader.metadata_size() + devices.iter().sum::<u64>());
}

fn sparse(size: u64, chunk_bits: u8, chunks: Vec<(u32, u64)>) -> NodeKind {
    let layout = DataLayout::Chunked { chunk_bits, chunks };
    NodeKind::Regular {
        layer: LayerIdx(0),
        data: FileData { size, layout },
    }
}

/// Returns a tree of a root and one file.
fn sample_of(kind: NodeKind) -> Sample {
    let mut builder = Builder::new(1);
    builder.add(Tree::ROOT, b"f", trees::meta(0, 0, 0), Xattrs::new(), kind);
    builder.finish()
}

#[test]
fn trees_that_no_disk_holds_are_refused() {
    let write = |sample: &Sample, devices: &[u64]| {
        erofs::write(&sample.tree, devices, &Digest::of(b""), Vec::new())
            .unwrap_err()
            .to_string()
    };
    let sample = Builder::new(0).finish();
    assert!(write(&sample, &[1 << 43, 1 << 43]).contains("16 TiB"));
    let mut builder = Builder::new(1);
    let kind = builder.flat(0, 5000);
    builder.add(Tree::ROOT, b"f", trees::meta(0, 0, 0), Xattrs::new(), kind);
    let sample = builder.finish();
    assert!(write(&sample, &[4096]).contains("/f lies outside the data device of layer 0"));
    assert!(write(&sample, &[]).contains("/f lies outside the data device of layer 0"));
    let mut builder = Builder::new(1);
    let xattrs: Xattrs = (0..5)
        .map(|n| trees::xattr(&format!("user.{n}"), &[0; 65_535]))
        .collect();
    builder.add(Tree::ROOT, b"f", trees::meta(0, 0, 0), xattrs, NodeKind::Fifo);
    assert!(write(&builder.finish(), &[0]).contains("/f take"));
    assert!(write(&sample_of(sparse(1 << 40, 0, vec![])), &[0]).contains("chunks of sparse files"));
    let sample = sample_of(sparse(1 << 30, 0, vec![]));
    let error = erofs::Planned::new(&sample.tree, &[0], 1 << 20)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/f") && error.contains("1 MiB") && error.contains("--memory"),
        "{error}"
    );
    assert!(write(&sample_of(sparse(u64::MAX, 31, vec![])), &[0]).contains("at most 2^63 - 1"));
    let far = sparse(1 << 60, 31, vec![(u32::MAX, 0)]);
    assert!(write(&sample_of(far), &[4096]).contains("outside the data device"));
    assert!(write(&sample_of(sparse(5, 32, vec![])), &[0]).contains("chunks are larger"));
    assert!(write(&sample_of(NodeKind::Symlink([b'l'; 4096].into())), &[0]).contains("symlink target"));
}
