//! The NBD door.

use super::{hold_first_layer, registry};
use crate::common::disk::ServedDisk;
use crate::common::nbd::{CACHE, DISCONNECT, FLUSH, NbdClient, TRIM, WRITE, WRITE_ZEROES};
use crate::common::ocifs::{Ocifs, eventually, tool};

const EPERM: u32 = 1;
const EINVAL: u32 = 22;

#[test]
fn other_clients_understand_it() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let info = String::from_utf8(tool("nbdinfo", ["--json", &disk.nbd_uri()])).unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let export = &info["exports"][0];
    for (name, expected) in [
        ("is_read_only", true),
        ("can_multi_conn", true),
        ("can_cache", true),
        ("can_trim", false),
    ] {
        assert_eq!(export[name], expected, "{name}: {info}");
    }
    let sizes = ["block_size_minimum", "block_size_preferred", "block_size_maximum"].map(|name| export[name].as_u64());
    assert_eq!(sizes, [Some(1), Some(4096), Some(32 << 20)], "{info}");
    assert_eq!(
        export["export-size"].as_u64(),
        std::fs::metadata(disk.file()).ok().map(|found| found.len())
    );
    let list = String::from_utf8(tool("nbdinfo", ["--list", &disk.nbd_uri()])).unwrap();
    assert!(list.contains("export=\"\""), "{list}");
    // A client without GO.
    tool("qemu-io", ["-r", "-f", "raw", "-c", "read 0 64k", &disk.nbd_uri()]);
}

#[test]
fn it_listens_on_loopback_and_nowhere_else() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let address = format!("localhost:{port}");
    ocifs.ok(["disk", "--nbd", &address, &image]);
    tool("nbdinfo", ["--size", &format!("nbd://{address}")]);
    let listed = ocifs.ok(["list"]).text().to_owned();
    assert!(listed.contains(&format!(":{port}")), "{listed}");
    let error = ocifs.fails(["disk", "--nbd", &address, &image]);
    assert!(error.contains("already"), "{error}");
    assert_eq!(ocifs.ok(["status", "--json", &address]).json()["state"], "ready");
    ocifs.ok(["umount", &address]);
    eventually("the port is free", || {
        std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()
    });
    let error = ocifs.fails(["disk", "--nbd", "192.0.2.1:10809", &image]);
    assert!(error.contains("loopback"), "{error}");
}

#[test]
fn what_is_no_read_is_refused_and_the_connection_goes_on() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let mut client = NbdClient::connect(&disk.nbd());
    let size = client.size;
    for (command, offset, length, error) in [
        (TRIM, 0, 4096, EPERM),
        (WRITE_ZEROES, 0, 4096, EPERM),
        (FLUSH, 0, 0, 0),
        (CACHE, 0, 1 << 20, 0),
        (77, 0, 0, EINVAL),
    ] {
        assert_eq!(client.call(command, offset, length), error, "{command}");
    }
    client.send(WRITE, 0, 5);
    client.send_raw(b"bytes");
    assert_eq!(client.head().1, EPERM);
    for (offset, length) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (0, 0), (0, (32 << 20) + 1)] {
        assert_eq!(client.read(offset, length), Err(EINVAL), "{offset} {length}");
    }
    assert_eq!(client.read(1024, 4).unwrap(), 0xe0f5_e1e2u32.to_le_bytes());
    assert_eq!(client.read(size - 1, 1).unwrap().len(), 1);
    client.send(DISCONNECT, 0, 0);
    assert!(client.is_closed());
}

#[test]
fn reads_of_every_length_have_the_right_bytes() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let expected = std::fs::read(disk.file()).unwrap();
    let mut client = NbdClient::connect(&disk.nbd());
    // The thread of the connection answers reads up to one MiB itself if they are local.
    for length in [1, 4095, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20] {
        for offset in [0, 513, expected.len() - length] {
            let bytes = client.read(offset as u64, length as u32).unwrap();
            assert!(bytes == expected[offset..][..length], "{length} bytes at {offset}");
        }
    }
}

#[test]
fn a_client_that_breaks_the_rules_is_disconnected_alone() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let mut good = NbdClient::connect(&disk.nbd());
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], b""] {
        let mut bad = NbdClient::connect(&disk.nbd());
        bad.send_raw(bytes);
        if !bytes.is_empty() {
            assert!(bad.is_closed(), "{bytes:?}");
        }
        let mut stream = UnixStream::connect(disk.nbd()).unwrap();
        // The server may close the connection at the first wrong byte.
        let _ = stream.write_all(bytes);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        assert!(said.starts_with(b"NBDMAGIC"), "{said:?}");
    }
    assert_eq!(good.read(1024, 4).unwrap(), 0xe0f5_e1e2u32.to_le_bytes());
    assert_eq!(disk.status()["state"], "ready");
}

#[test]
fn a_read_that_waits_does_not_delay_others() {
    let (registry, image) = registry();
    let ocifs = Ocifs::knowing(&image);
    let disk = ServedDisk::serve(&ocifs, &image, &["--prefetch", "none"]);
    let start = hold_first_layer(&registry, &image);
    let mut client = NbdClient::connect(&disk.nbd());
    // The first layer lies behind the metadata; the last one is local or can be fetched.
    let size = client.size;
    client.read(size - 4096, 4096).unwrap();
    let late = client.send(0, start, 4096);
    let metadata = client.send(0, 0, 4096);
    let local = client.send(0, size - 4096, 4096);
    for expected in [metadata, local] {
        assert_eq!(client.head(), (expected, 0));
        client.data(4096);
    }
    registry.release();
    assert_eq!(client.head(), (late, 0));
    client.data(4096);
}
