//! Reads of an EROFS mount that nobody waits for any more.
//!
//! The kernel takes down a file system only after all reads that it began have ended. While it waits, the program that
//! unmounts cannot be killed, and sync(2) hangs on the whole machine. FUSE does not have this problem, because the kernel
//! fails its reads first.
//!
//! So the process behind the mount ends if all of this holds: it has unmounted, that call has not returned, and reads wait.
//! The end fails the reads. Nobody uses the file system then: as long as there is a user, the kernel does not take the file
//! system down, and the call returns at once.
//!
//! If another program unmounts, nobody knows whether the kernel waits or an unseen user is left. Then the reads end when
//! their bytes come or their time is over.

use std::sync::Arc;
use std::time::Duration;

use crate::content::Content;
use crate::mount::attached::Attached;

/// Interval at which the mount is looked at while the unmount is held up. A larger value delays the end of a mount without
/// users; a smaller one looks more often.
const LOOK: Duration = Duration::from_millis(300);
/// Consecutive looks that must all find the same. More looks delay the end; a single one could hit an unmount that is about
/// to return.
const LOOKS: u32 = 2;

/// Completes when only reads are left that hold up an unmount by this process, which has begun and has not returned.
pub(super) fn unwanted(content: Arc<Content>, attached: &Attached) -> impl Future<Output = ()> + use<> {
    let unfinished = attached.unfinished().clone();
    async move {
        let mut found = 0;
        while found < LOOKS {
            tokio::time::sleep(LOOK).await;
            if !unfinished.any() {
                // The kernel is about to end the session.
                std::future::pending::<()>().await;
            }
            found = if content.has_waiting_reads() { found + 1 } else { 0 };
        }
    }
}
