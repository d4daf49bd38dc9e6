//! A disk while its registry is in trouble.

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use super::vhost::client::{IN, IOERR, OK, VhostClient};
use super::{hold_first_layer, registry};
use crate::common::disk::ServedDisk;
use crate::common::nbd::NbdClient;
use crate::common::ocifs::Ocifs;

const EIO: u32 = 5;

#[test]
fn reads_fail_in_time_and_succeed_afterwards() {
    let (registry, image) = registry();
    let ocifs = Ocifs::with(&["--timeout", "3s"]).learns(&image);
    let disk = ServedDisk::serve(&ocifs, &image, &["--prefetch", "none"]);
    let start = hold_first_layer(&registry, &image);
    let (mut nbd, mut vhost) = (NbdClient::connect(&disk.nbd()), VhostClient::connect(&disk.vhost()));
    let file = std::fs::File::open(disk.file()).unwrap();
    let in_time = |read: &mut dyn FnMut()| {
        let start = Instant::now();
        read();
        let took = start.elapsed();
        assert!(
            took > Duration::from_secs(2) && took < Duration::from_secs(6),
            "{took:?}"
        );
    };
    in_time(&mut || assert_eq!(nbd.read(start, 4096), Err(EIO)));
    in_time(&mut || assert_eq!(vhost.call(IN, start + (64 << 10), 4096).0, IOERR));
    in_time(&mut || {
        let error = file.read_at(&mut [0; 4096], start + (512 << 10)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(EIO as i32));
    });
    // Metadata and local bytes are not concerned.
    assert!(nbd.read(0, 4096).is_ok());
    let problem = disk.status()["problem"].clone();
    assert!(problem.is_string(), "{problem}");
    registry.release();
    let deadline = Instant::now() + Duration::from_secs(30);
    while nbd.read(start, 4096).is_err() {
        assert!(Instant::now() < deadline, "it does not recover");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(vhost.call(IN, start + (64 << 10), 4096).0, OK);
    assert!(std::fs::read(disk.file()).unwrap().len() as u64 == nbd.size);
    assert_eq!(disk.status()["problem"], serde_json::Value::Null);
}
