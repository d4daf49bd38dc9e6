//! The vhost-user-blk door.

pub mod client;

use nix::sys::signal::Signal;

use self::client::{FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, VhostClient};
use super::{hold_first_layer, registry};
use crate::common::disk::ServedDisk;
use crate::common::ocifs::{Ocifs, alive, eventually, send};

#[test]
fn requests_are_answered_as_the_specification_says() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let expected = std::fs::read(disk.file()).unwrap();
    let mut client = VhostClient::connect(&disk.vhost());
    assert_eq!(client.capacity, expected.len() as u64);
    let (status, data) = client.call(IN, 4096, 65_536);
    assert_eq!(status, OK);
    assert!(data == expected[4096..][..65_536]);
    // A sector is the smallest unit.
    assert!(client.call(IN, 512, 512).1 == expected[512..1024]);
    assert_eq!(client.call(IN, client.capacity - 512, 1024).0, IOERR);
    assert_eq!(client.call(OUT, 0, 4096).0, IOERR);
    assert_eq!(client.call(FLUSH, 0, 0).0, OK);
    assert_eq!(client.call(77, 0, 4096).0, UNSUPP);
    let digest = disk.status()["digest"].as_str().unwrap().to_owned();
    let (status, id) = client.call(GET_ID, 0, 20);
    assert_eq!(
        (status, std::str::from_utf8(&id).unwrap()),
        (OK, &digest["sha256:".len()..][..20])
    );
    // The device begins anew after a disconnection.
    drop(client);
    let mut client = VhostClient::connect(&disk.vhost());
    assert!(client.call(IN, 0, 4096).1 == expected[..4096]);
    client.submit(1, IN, 0, 512);
    client.answer();
    assert_eq!(client.stop_queue(), 2);
}

#[test]
fn reads_of_every_length_have_the_right_bytes() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let expected = std::fs::read(disk.file()).unwrap();
    let mut client = VhostClient::connect(&disk.vhost());
    // The thread of the queue answers reads up to one MiB itself if they are local.
    for length in [512, (1 << 20) - 512, 1 << 20, (1 << 20) + 512, 2 << 20] {
        for offset in [0, 512, expected.len() - length] {
            let (status, data) = client.call(IN, offset as u64, length as u32);
            assert_eq!(status, OK);
            assert!(data == expected[offset..][..length], "{length} bytes at {offset}");
        }
    }
}

#[test]
fn requests_that_are_none_are_answered_without_a_status() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let mut client = VhostClient::connect(&disk.vhost());
    // A chain without an end, one that leaves the memory, one without a status.
    client.describe(0, 0x3000, 16, 1, 0);
    client.describe(1, u64::MAX - 4, 16, 1, 2);
    client.describe(2, 0x4000, 1, 2, 0);
    client.describe(3, 0x3000, 16, 0, 0);
    for head in [0, 1, 3] {
        client.offer(head);
        assert_eq!(client.answer(), (head, 0));
    }
    assert_eq!(client.call(IN, 0, 4096).0, OK);
    // A message that is none ends this connection, and no other.
    let mut other = VhostClient::connect(&disk.vhost());
    other.send(4242, &[1; 40], None);
    assert!(other.is_closed());
    // A queue that the device does not have.
    let mut other = VhostClient::connect(&disk.vhost());
    other.send(11, &[0xff; 8], None);
    assert!(other.is_closed());
    assert_eq!(client.call(IN, 0, 4096).0, OK);
}

#[test]
fn a_read_that_waits_does_not_delay_others() {
    let (registry, image) = registry();
    let ocifs = Ocifs::knowing(&image);
    let disk = ServedDisk::serve(&ocifs, &image, &["--prefetch", "none"]);
    let start = hold_first_layer(&registry, &image);
    let mut client = VhostClient::connect(&disk.vhost());
    client.submit(5, IN, start, 4096);
    for _ in 0..20 {
        client.submit(6, IN, 0, 4096);
        assert_eq!(client.answer().0, 18);
    }
    assert!(!client.has_answer());
    registry.release();
    assert_eq!(client.answer().0, 15);
    assert_eq!(client.status(5), OK);
}

#[test]
fn requests_in_flight_are_answered_by_the_next_process() {
    let (registry, image) = registry();
    let ocifs = Ocifs::knowing(&image);
    let mut disk = ServedDisk::serve(&ocifs, &image, &["--prefetch", "none", "--timeout", "never"]);
    let start = hold_first_layer(&registry, &image);
    let mut client = VhostClient::connect(&disk.vhost());
    // The first requests wait. Later ones are answered, more of them than the queue has entries.
    client.submit(2, IN, start, 4096);
    client.submit(3, IN, start + 65_536, 4096);
    for _ in 0..100 {
        client.submit(7, IN, 0, 512);
        assert_eq!(client.answer().0, 21);
    }
    eventually("both wait", || disk.status()["reads"]["waiting"] == 2);
    send(disk.pid, Signal::SIGKILL);
    eventually("the process is dead", || !alive(disk.pid));
    registry.release();
    disk.restart(&image, &[]);
    let mut client = client.reconnect(&disk.vhost());
    let mut answered = [client.answer().0, client.answer().0];
    answered.sort_unstable();
    assert_eq!(answered, [6, 9]);
    let expected = std::fs::read(disk.file()).unwrap();
    assert!(client.data(2, 4096) == expected[start as usize..][..4096]);
    assert!(client.data(3, 4096) == expected[start as usize + 65_536..][..4096]);
    assert!(!client.has_answer());
    assert_eq!(client.call(IN, 0, 4096).0, OK);
}
