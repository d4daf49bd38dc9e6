//! Mount namespaces for tests.
//!
//! A new namespace has a copy of every mount, including mounts of tests that run at the same time. Such a copy keeps
//! a mount alive after its test has taken it down. So every test that makes a namespace takes down the copies of
//! other tests' mounts in it.

use std::fs;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Text that the paths of all mount points of tests contain, see [`super::ocifs::mountpoint`].
const MOUNTPOINTS: &str = "/ocifs-mnt-";

/// Shared by tests that take down copies of other tests' mounts, and held alone by tests whose mounts must not be copied.
static COPIES: RwLock<()> = RwLock::new(());

/// Returns once no test runs whose mounts must not be copied. The caller holds the result while it makes a namespace and
/// takes down the copies in it.
pub fn copies() -> RwLockReadGuard<'static, ()> {
    COPIES.read().unwrap_or_else(PoisonError::into_inner)
}

/// Returns once no test takes down copies, and keeps others from beginning. For tests in which reads of the kernel's EROFS
/// never end: if their mount is gone before its copy, the unmount of the copy waits for these reads.
pub fn no_copies() -> RwLockWriteGuard<'static, ()> {
    COPIES.write().unwrap_or_else(PoisonError::into_inner)
}

/// A function for shell scripts that run in a namespace of their own. `leave_others MOUNTPOINT` takes down the mounts
/// of tests, but for those at or below that path.
pub const LEAVE_OTHERS: &str = r#"
leave_others() {
    cut -d ' ' -f 5 /proc/self/mountinfo | grep -F /ocifs-mnt- | tac | while read -r other; do
        case $other in "$1" | "$1"/*) ;; *) umount -l "$other" 2>/dev/null || : ;; esac
    done
}
"#;

/// Runs `body` in a mount namespace of its own, and in the further namespaces that `flags` names. `hosts` is the
/// content of `/etc/hosts` there.
pub fn with_hosts(hosts: &str, flags: CloneFlags, body: impl FnOnce() + Send) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), hosts).unwrap();
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNS | flags).unwrap();
        let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mount(none, "/", none, private, none).unwrap();
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let others = table.lines().filter_map(|line| line.split(' ').nth(4));
        for other in others
            .filter(|path| path.contains(MOUNTPOINTS))
            .collect::<Vec<_>>()
            .iter()
            .rev()
        {
            umount2(Path::new(other), MntFlags::MNT_DETACH).unwrap();
        }
        mount(Some(file.path()), "/etc/hosts", none, MsFlags::MS_BIND, none).unwrap();
        body();
    };
    let _copies = copies();
    // Uses a new thread, because a namespace belongs to a thread. A test may share its thread with other tests.
    std::thread::scope(|scope| {
        if let Err(panic) = scope.spawn(inside).join() {
            std::panic::resume_unwind(panic);
        }
    });
}
