//! Tables that cannot be fetched: the layer is streamed soon, and readers wait no longer than the timeout.

use std::process::Command;
use std::time::Duration;

use super::scene::{Scene, dump, plain_dump};
use crate::common::carried::Dialect;
use crate::common::ocifs::{bounded, eventually};
use crate::common::registry::Fault;

/// Timeout of reads, longer than a table may take and shorter than a test waits for a command.
const TIMEOUT: &str = "6s";

#[test]
fn a_table_that_does_not_come_is_not_waited_for() {
    let expected = plain_dump();
    const BOTH: &[&[&str]] = &[&[], &["--wait", "ready"]];
    let trickle = Fault::Slow(1, Duration::from_millis(100));
    for (dialect, fault, ways) in [
        (Dialect::Estargz, Fault::status(500), BOTH),
        (Dialect::Containers, Fault::Stall(10), BOTH),
        (Dialect::StargzZstd, Fault::Silence, &BOTH[..1]),
        (Dialect::Containers, trickle, &BOTH[..1]),
    ] {
        for &options in ways {
            let mut scene = Scene::new(dialect);
            scene.ocifs = scene.ocifs.options(&["--timeout", TIMEOUT]);
            scene.registry.fault_ranges(&scene.layer.blob.path(), fault.clone());
            let mount = scene
                .ocifs
                .mount_with(&scene.image, &[options, &["--prefetch", "none"]].concat());
            let said = bounded(Command::new("cat").arg(mount.join("last")));
            assert_eq!(said.code, Some(0), "{dialect:?} {fault:?} {options:?}: {said:?}");
            assert_eq!(scene.authority(&mount), "pass", "{fault:?}");
            assert!(
                mount
                    .log()
                    .contains("the layer's own table of contents cannot be fetched"),
                "{fault:?}: {}",
                mount.log()
            );
            assert_eq!(dump(mount.path()), expected, "{fault:?}");
        }
    }
}

#[test]
fn a_read_that_waits_for_a_table_ends_at_the_timeout() {
    let mut scene = Scene::new(Dialect::Containers);
    scene.ocifs = scene.ocifs.options(&["--timeout", "2s"]);
    scene.registry.hold(&scene.layer.blob.path());
    let mount = scene.ocifs.mount_with(&scene.image, &[]);
    for path in ["last", "."] {
        let said = bounded(Command::new("ls").arg("-d").arg(mount.join(path)));
        assert_eq!(said.code, Some(2), "{path}: {said:?}");
    }
    scene.registry.release();
    eventually("the registry answers again", || mount.join("last").exists());
}
