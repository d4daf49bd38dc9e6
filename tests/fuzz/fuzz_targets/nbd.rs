//! What an NBD client may send: the server does not panic, and answers only in the protocol.
#![no_main]

#[path = "../disk.rs"]
mod disk;

use libfuzzer_sys::fuzz_target;
use ocifs::nbd;

fuzz_target!(|data: &[u8]| {
    let served = disk::served();
    let mut answers = Vec::new();
    let _ = nbd::serve(&served.disk, served.runtime.handle(), data, &mut answers, || Ok(()));
    assert!(answers.starts_with(b"NBDMAGICIHAVEOPT"));
});
