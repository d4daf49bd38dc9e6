//! Annotations and footers that say where a layer's own table is: no panic, and never a place outside the blob.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use ocifs::toc::carried::{Footer, TableRef};

// The input is JSON with annotations, then the end of the blob. A zero byte is between them.
fuzz_target!(|data: &[u8]| {
    let at = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    let (json, tail) = (&data[..at], data.get(at + 1..).unwrap_or_default());
    let _ = Footer::parse(tail);
    let Ok(annotations) = serde_json::from_slice::<BTreeMap<String, String>>(json) else {
        return;
    };
    let size = 1000 + tail.len() as u64;
    let Ok(Some(table)) = TableRef::in_annotations(&annotations, size) else {
        return;
    };
    let first = table.first_range();
    assert!(first.start < first.end && first.end <= size);
    if let Ok(place) = table.table_range(tail) {
        assert!(place.start < place.end && place.end <= first.end);
        let _ = table.read(
            place.clone(),
            &tail[..tail.len().min((place.end - place.start) as usize)],
        );
    }
});
