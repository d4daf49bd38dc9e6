//! Decoded data in memory, when there is no store to keep it.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use nix::libc;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, eventually};
use crate::common::registry::TestRegistry;

const BIG: usize = 8 << 20;
const LIMIT: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// A page of a file, asked of the process and not of the page cache.
fn read_direct(file: &File, offset: u64) -> Vec<u8> {
    let mut buffer = [0_u8; 2 * BLOCK];
    let aligned = buffer.as_ptr().align_offset(BLOCK);
    file.read_exact_at(&mut buffer[aligned..][..BLOCK], offset).unwrap();
    buffer[aligned..][..BLOCK].to_vec()
}

#[test]
fn memory_keeps_what_was_read_last_and_no_more_than_it_may() {
    let tar = Tar::new().file("big", noise(3, BIG)).finish();
    for layer in [Blob::gzip(&tar), Blob::plain(tar.clone())] {
        let registry = TestRegistry::start();
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        let file = tempfile::NamedTempFile::new().unwrap();
        let ocifs = Ocifs::at(&file.path().join("store"));
        let mount = ocifs.mount_with(
            &format!("{}/app:1", registry.host()),
            &["--memory", "1MiB", "--wait", "ready"],
        );
        let problem = mount.status()["problem"].clone();
        assert!(problem.as_str().is_some_and(|p| p.contains("store")), "{problem}");
        let memory = || mount.status()["memory"].as_u64().unwrap();
        let content = noise(3, BIG);
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(mount.join("big"))
            .unwrap();
        let offsets = || (0..BIG).step_by(64 << 10);
        for offset in offsets() {
            assert!(
                read_direct(&file, offset as u64) == content[offset..][..BLOCK],
                "{offset} {}",
                layer.media_type
            );
            assert!(memory() <= LIMIT, "{}", memory());
        }
        assert!(memory() > 0, "nothing is kept: {}", layer.media_type);
        let last = offsets().next_back().unwrap();
        registry.clear_log();
        for _ in 0..3 {
            assert!(read_direct(&file, last as u64) == content[last..][..BLOCK]);
        }
        assert_eq!(
            registry.count(&layer.path()),
            0,
            "the last span again: {}",
            layer.media_type
        );
        // What was read first had to go for that.
        assert!(read_direct(&file, 0) == content[..BLOCK]);
        assert_ne!(registry.count(&layer.path()), 0, "{}", layer.media_type);
        let mut before = 0;
        eventually("what is read ahead has come", || {
            let load = &mount.status()["in_flight"];
            let now = registry.count(&layer.path());
            load["others"] == 0 && load["waiting"] == 0 && std::mem::replace(&mut before, now) == now
        });
        registry.clear_log();
        assert!(read_direct(&file, 0) == content[..BLOCK]);
        assert_eq!(
            registry.count(&layer.path()),
            0,
            "the first span again: {}",
            layer.media_type
        );
        assert!(memory() <= LIMIT, "{}", memory());
    }
}
