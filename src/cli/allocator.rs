//! Tells the C library's allocator when to give memory back to the kernel.
//!
//! By default glibc raises its mapping threshold up to 32 MiB as long blocks are freed. Blocks below the threshold come from
//! the heap. Tables that grow there leave holes that nothing else can use: merging an image with a million different attributes
//! took a third more memory than its data. With a fixed threshold (mallopt(3)) long blocks are mapped one by one. They grow in
//! place, and go back to the kernel when they are freed.

/// Length in bytes from which a block is mapped by itself. The buffers of a first pass are shorter and stay in the heap.
#[cfg(target_env = "gnu")]
const MAPPED: i32 = 1 << 20;
/// Free bytes that may stay at the end of the heap. With more, the heap shrinks.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 2 << 20;

/// Fixes both thresholds. Call it first, before the program allocates anything large.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub(super) fn settle() {
    // SAFETY: mallopt takes numbers and may be called at any time. What it refuses stays as it was.
    unsafe {
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, MAPPED);
        nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Does nothing: other allocators give memory back by themselves.
#[cfg(not(target_env = "gnu"))]
pub(super) fn settle() {}
