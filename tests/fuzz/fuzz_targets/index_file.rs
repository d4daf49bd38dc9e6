//! Index files of any content, with a correct checksum so that they get past it: reading them and their parts does not panic,
//! and a file that is read is written as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ocifs::index::SpanIndex;
use ocifs::oci::Digest;
use ocifs::published::IndexFile;
use ocifs::toc::PackedToc;

fuzz_target!(|data: &[u8]| {
    let Some(size) = data.get(16..24) else { return };
    let size = u64::from_le_bytes(std::array::from_fn(|i| size[i]));
    // The layer that the file itself names, so that it is not refused as one of another layer.
    let named = data.get(48).and_then(|&length| data.get(49..49 + usize::from(length)));
    let named = named.and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
    let layer = named.unwrap_or_else(|| Digest::of(b"layer"));
    let mut bytes = data.to_vec();
    bytes.extend_from_slice(blake3::hash(data).as_bytes());
    let Ok(file) = IndexFile::decode("file", &bytes, &layer, size) else {
        return;
    };
    let again = IndexFile::decode("file", &file.encode(), &layer, size).unwrap();
    assert_eq!(again, file);
    let _ = SpanIndex::open(file.spans);
    if let Ok(toc) = PackedToc::open(file.toc) {
        let _ = toc.extent_table();
    }
});
