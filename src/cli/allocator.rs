//! How the C library's allocator gives memory back.
//!
//! By itself glibc takes longer and longer blocks from its heap, up to 32 MiB each, where tables that grow leave holes which
//! nobody else can use. Merging an image of a million different attributes so took a third more memory than it had. With a
//! fixed threshold (mallopt(3)) long blocks are mapped one by one, grow in place, and go back when they are freed.

/// Blocks from this length on are mapped one by one. The buffers of a first pass are shorter and stay in the heap.
#[cfg(target_env = "gnu")]
const MAPPED: i32 = 1 << 20;
/// So much may be free at the end of the heap before it goes back.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 2 << 20;

/// Fixes the thresholds. Best done before there is anything else.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub(super) fn settle() {
    // SAFETY: mallopt takes numbers and may be called at any time. What it refuses stays as it was.
    unsafe {
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, MAPPED);
        nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Other allocators do so by themselves.
#[cfg(not(target_env = "gnu"))]
pub(super) fn settle() {}
