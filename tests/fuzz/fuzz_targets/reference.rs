//! Texts of any content: parsing references, digests, platforms and documents does not panic, and what parses is written as it
//! was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ocifs::oci::{Digest, ImageConfig, ImageIndex, ImageRef, Manifest, Platform, Reference, classify};

fuzz_target!(|data: &[u8]| {
    let _ = classify("", data);
    let _ = ImageIndex::parse(data);
    let _ = ImageConfig::parse(data);
    if let Ok(manifest) = Manifest::parse(data) {
        let _ = manifest.refusal();
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = text.parse::<Digest>();
    let _ = text.parse::<Platform>();
    let _ = text.parse::<ImageRef>();
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string().parse::<Reference>().as_ref(), Ok(&reference));
    }
});
