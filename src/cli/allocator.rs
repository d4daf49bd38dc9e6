//! Tells the C library's allocator when to give memory back to the kernel.
//!
//! A mount that streamed an image needs much memory for a moment and little afterwards. What was freed in between lies in
//! holes of the heap, and the allocator keeps those. So a mount that is idle asks for them to be given back.
//!
//! By default glibc raises its mapping threshold up to 32 MiB as long blocks are freed. Blocks below the threshold
//! come from the heap. Tables that grow there leave holes that nothing else can use. With the default, merging an
//! image with a million different attributes took a third more memory than its data. With a fixed threshold
//! (mallopt(3)) long blocks are mapped one by one. They grow in place, and go back to the kernel when they are freed.

use std::time::Duration;

/// Time without work after which a mount is idle. With a shorter time, a busy mount gives back what it needs again at once;
/// with a longer one, an idle mount keeps memory.
const IDLE: Duration = Duration::from_secs(5);

/// Gives memory back each time after the number that `work` returns has changed and then stays the same for a while. Ends
/// when `work` returns none.
pub(super) async fn give_back_when_idle(work: impl Fn() -> Option<u64>) {
    let (mut last, mut given_back) = (None, false);
    while let Some(now) = work() {
        if last != Some(now) {
            (last, given_back) = (Some(now), false);
        } else if !given_back {
            give_back();
            given_back = true;
        }
        tokio::time::sleep(IDLE).await;
    }
}

/// Length from which a block is mapped by itself, in bytes. The buffers of a first pass are shorter and stay in the
/// heap.
#[cfg(target_env = "gnu")]
const MAPPED: i32 = 1 << 20;
/// Free bytes that may stay at the end of the heap. With more, the heap shrinks.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 2 << 20;

/// Fixes both thresholds. Call it first, before the program allocates anything large.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub(super) fn settle() {
    // SAFETY: mallopt takes numbers and may be called at any time. A value that it refuses changes nothing.
    unsafe {
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, MAPPED);
        nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Gives the holes of the heap back to the kernel.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
fn give_back() {
    // SAFETY: malloc_trim takes a number and may be called at any time, by any thread.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

/// Does nothing: there is no such call.
#[cfg(not(target_env = "gnu"))]
fn give_back() {}

/// Does nothing: other allocators give long blocks back by themselves.
#[cfg(not(target_env = "gnu"))]
pub(super) fn settle() {}
