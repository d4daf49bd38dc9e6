//! What a registry may say in headers and small bodies: parsing any of it does not panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ocifs::registry::{challenge, content_range::ContentRange, credentials::AuthFile, failure, token};

fuzz_target!(|data: &[u8]| {
    let _ = failure::message(data);
    let _ = token::parse(data, std::time::UNIX_EPOCH);
    if let Ok(file) = AuthFile::parse(data) {
        let _ = file.find("docker.io", "library/alpine");
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    for challenge in challenge::parse(text) {
        let _ = challenge.get("realm");
    }
    if let Some(range) = ContentRange::parse(text) {
        let _ = range.check(&(0..10), 20);
    }
});
