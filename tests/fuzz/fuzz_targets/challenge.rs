//! What a registry may say in headers and small bodies: parsing any of it does not panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ocifs::registry::credentials::AuthFile;
use ocifs::registry::parsers::{ContentRange, parse_challenge, parse_error, parse_token};

fuzz_target!(|data: &[u8]| {
    let _ = parse_error(data);
    let _ = parse_token(data, std::time::UNIX_EPOCH);
    if let Ok(file) = AuthFile::parse(data) {
        let _ = file.find("docker.io", "library/alpine");
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    for challenge in parse_challenge(text) {
        let _ = challenge.get("realm");
    }
    let _ = ContentRange::parse(text);
});
