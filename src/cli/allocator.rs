//! Tells the C library's allocator when to give memory back to the kernel.
//!
//! A mount that streamed an image needs much memory for a moment and little afterwards. What was freed in between lies in
//! holes of the heap, and the allocator keeps those. [`give_back`] makes it give them to the kernel.
//!
//! By default glibc raises its mapping threshold up to 32 MiB as long blocks are freed. Blocks below the threshold
//! come from the heap. Tables that grow there leave holes that nothing else can use. With the default, merging an
//! image with a million different attributes took a third more memory than its data. With a fixed threshold
//! (mallopt(3)) long blocks are mapped one by one. They grow in place, and go back to the kernel when they are freed.
//!
//! By default glibc makes up to eight heaps for each processor, one for each thread that allocates while the others are
//! busy. A mount has more threads than run at the same time, and each heap keeps holes of its own. So there is one heap for
//! each processor.

/// Length from which a block is mapped by itself, in bytes. The buffers of a first pass are shorter and stay in the
/// heap.
#[cfg(target_env = "gnu")]
const MAPPED: i32 = 1 << 20;
/// Free bytes that may stay at the end of the heap. With more, the heap shrinks.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 2 << 20;

/// Most heaps. With more, an idle mount on a large machine keeps more holes; with fewer, threads wait for each other.
#[cfg(target_env = "gnu")]
const MOST_HEAPS: usize = 8;

/// Fixes the thresholds and the number of heaps. Call it first, before the program allocates anything large.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub(super) fn settle() {
    let processors = std::thread::available_parallelism().map_or(MOST_HEAPS, usize::from);
    let heaps = processors.clamp(2, MOST_HEAPS) as i32;
    // SAFETY: mallopt takes numbers and may be called at any time. A value that it refuses changes nothing.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, heaps);
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, MAPPED);
        nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Gives the holes of the heap back to the kernel.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub(super) fn give_back() {
    // SAFETY: malloc_trim takes a number and may be called at any time, by any thread.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

/// Does nothing: there is no such call.
#[cfg(not(target_env = "gnu"))]
pub(super) fn give_back() {}

/// Does nothing: other allocators give long blocks back by themselves.
#[cfg(not(target_env = "gnu"))]
pub(super) fn settle() {}
