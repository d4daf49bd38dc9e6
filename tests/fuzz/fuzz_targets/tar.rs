//! Tars and stored tables of contents: errors are fine, panics are bugs, memory stays in proportion to the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ocifs::toc::{ExtentTable, Limits, TarReader, Toc};

// The first byte chooses what the rest is.
fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else {
        return;
    };
    match choice {
        0..=191 => tar(choice, data),
        192..=223 => table(&with_checksum(data)),
        _ => extents(&with_checksum(data)),
    }
});

/// The split must not change the result, and whatever is read must survive its encoding.
fn tar(seed: u8, data: &[u8]) {
    let whole = read(data, usize::MAX);
    assert_eq!(read(data, usize::from(seed) * 7 + 1), whole);
    if let Some(toc) = whole {
        let mut encoded = Vec::new();
        toc.encode(&mut encoded).expect("writing to memory");
        assert_eq!(Toc::decode(&encoded).as_ref(), Ok(&toc));
        let mut encoded = Vec::new();
        toc.extent_table().encode(&mut encoded).expect("writing to memory");
        extents(&encoded);
    }
}

fn read(data: &[u8], step: usize) -> Option<Toc> {
    let mut reader = TarReader::new(Limits::default());
    let mut next = 0;
    for piece in data.chunks(step) {
        let mut deliver = |device: u64, content: &[u8]| {
            assert!(device >= next && !content.is_empty());
            next = device + content.len() as u64;
        };
        reader.push(piece, &mut deliver).ok()?;
    }
    let packed = reader.finish().ok()?.toc;
    Some(packed.unpack().expect("packed just now"))
}

/// Makes the last 32 bytes the checksum, or nothing behind it would ever be reached.
fn with_checksum(data: &[u8]) -> Vec<u8> {
    let content = &data[..data.len().saturating_sub(32)];
    [content, blake3::hash(content).as_bytes()].concat()
}

fn table(bytes: &[u8]) {
    if let Ok(toc) = Toc::decode(bytes) {
        let mut encoded = Vec::new();
        toc.encode(&mut encoded).expect("writing to memory");
        assert_eq!(Toc::decode(&encoded).as_ref(), Ok(&toc));
    }
}

fn extents(bytes: &[u8]) {
    if let Ok(table) = ExtentTable::open(bytes) {
        for extent in table.iter() {
            let (tar, device) = (
                extent.tar..extent.tar + extent.len,
                extent.device..extent.device + extent.len,
            );
            assert!(table.pieces_in_tar(tar).eq([extent]));
            assert!(table.pieces_in_device(device).eq([extent]));
        }
    }
}
