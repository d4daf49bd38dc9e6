//! `ocifs run` and `ocifs bundle` without root: with bubblewrap, crun and runc.

use super::{User, make_readable};
use crate::common::layers::{Blob, Tar, header};
use crate::common::oci_layout;

/// A user with an image of busybox, which scripts call `$BOX`.
fn user() -> User {
    let user = User::new();
    let busybox = std::fs::read("/bin/busybox").expect("these tests need busybox (busybox-static)");
    let program = header(b"bin/busybox", tar::EntryType::Regular, 0o755, busybox.len() as u64);
    // Without them, no file system could be mounted in a root that is only read.
    let layer = ["bin/", "dev/", "proc/", "sys/"].into_iter().fold(Tar::new(), Tar::dir);
    let mut layer = layer.raw(program, &busybox).file(
        "etc/passwd",
        "root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/home/app:/bin/sh\n",
    );
    for name in ["sh", "cat", "id", "ls", "sleep", "touch", "hostname", "grep"] {
        layer = layer.link(tar::EntryType::Symlink, &format!("bin/{name}"), "busybox");
    }
    let path = user.directory.path().join("box");
    oci_layout::write(&path, &[Blob::gzip(&layer.finish())]);
    make_readable(&path);
    user
}

/// What the scripts begin with.
const BOX: &str = "BOX=oci:$DIR/box\n";

fn run(user: &User, script: &str) -> String {
    user.run(&[BOX, script].concat())
}

#[test]
fn an_ordinary_user_runs_programs_with_bubblewrap() {
    let user = user();
    let said = run(
        &user,
        r#"
        # Nothing but bubblewrap helps.
        mkdir bin && for tool in bwrap cat grep; do ln -s "$(command -v "$tool")" bin; done
        PATH=$DIR/system:$PWD/bin
        ocifs run "$BOX" sh -c 'echo $(id -u):$(id -g) $HOME $(hostname) $(pwd); touch /new && ls /new; exit 7' || echo "status $?"
        ocifs run --user app --workdir /srv "$BOX" sh -c 'echo $(id -u):$(id -g) $HOME $(pwd); grep CapEff /proc/self/status'
        ocifs run "$BOX" ls /new || echo "nothing is kept"
        fails ocifs run --read-only "$BOX" touch /new
        ocifs run --network none "$BOX" cat /proc/net/dev | grep -c :
        ocifs run "$BOX" sh -c 'echo $$'
        fails ocifs run "$BOX" no-such-program
        ocifs list
        "#,
    );
    for expected in [
        "0:0 /root ocifs /\n/new\nstatus 7\n",
        "1234:1235 /home/app /srv\nCapEff:\t0000000000000000\n",
        "nothing is kept\n",
        "touch: /new: Read-only file system\n1\n1\n",
        "no-such-program",
    ] {
        assert!(said.contains(expected), "no {expected}: {said}");
    }
    assert!(!said.contains("oci:"), "something is still mounted: {said}");
}

#[test]
fn signals_reach_a_program_under_bubblewrap() {
    let user = user();
    let said = run(
        &user,
        r#"
        ocifs run --runtime bwrap "$BOX" sh -c 'trap "exit 9" TERM; echo ready; while :; do sleep 0.1; done' > out &
        until grep ready out; do sleep 0.05; done
        kill -TERM $!
        wait $! || echo "status $?"
        "#,
    );
    assert_eq!(said, "ready\nstatus 9\n");
}

#[test]
fn an_ordinary_user_runs_programs_with_a_runtime() {
    let user = user();
    let said = run(
        &user,
        r#"
        fails ocifs run --runtime crun --user app "$BOX" id
        for runtime in crun runc; do
            ocifs run --runtime "$runtime" "$BOX" sh -c 'echo $(id -u):$(id -g); touch /new && ls /new; exit 7' || echo "$runtime $?"
        done
        "#,
    );
    let (refusal, said) = said.split_once('\n').unwrap();
    assert!(
        refusal.contains("cannot run a program as user 1234 and group 1235: use bubblewrap"),
        "{refusal}"
    );
    assert_eq!(said, "0:0\n/new\ncrun 7\n0:0\n/new\nrunc 7\n");
}

#[test]
fn the_root_of_an_ordinary_users_bundle_can_be_changed() {
    let user = user();
    let said = run(
        &user,
        r#"
        ocifs bundle "$BOX" bundle sh -c 'touch /new && ls /new'
        crun run --bundle bundle "test-$$"
        ocifs umount bundle/rootfs
        "#,
    );
    assert_eq!(said, "/new\n");
}
