//! Index files of any content, with a correct checksum so that they get past it: opening and using them does not panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ocifs::index::SpanIndex;

fuzz_target!(|data: &[u8]| {
    let _ = SpanIndex::open(data.to_vec());
    let mut bytes = data.to_vec();
    bytes.extend_from_slice(blake3::hash(data).as_bytes());
    let Ok(index) = SpanIndex::open(bytes) else { return };
    let mut file = Vec::new();
    index.write(&mut file).unwrap();
    assert!(SpanIndex::open(file).is_ok());
    for span in index.spans().take(8).chain(index.spans().rev().take(8)) {
        let tar = index.tar_range(span);
        assert_eq!(index.span_at(tar.start), Some(span));
        assert_eq!(index.span_at(tar.end - 1), Some(span));
        let first = index.restart_for(span);
        let range = index.blob_range(first, span);
        assert!(range.start <= range.end && range.end <= index.blob_size());
        if let Ok(mut decoder) = index.decoder(first, span) {
            let _ = decoder.push(&data[..data.len().min(4096)], &mut |_, _: &[u8]| ());
        }
    }
});
