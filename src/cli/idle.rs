//! Gives memory of an idle mount back to the kernel.
//!
//! A mount needs much memory and much of its program until the image is ready, and little of either afterwards. When it has
//! had no work for a while, the allocator gives back its holes, and the pages of the program are taken out of the process.
//! They stay in the page cache, which all mounts share. A page that runs again comes back from there within a microsecond.

use std::time::Duration;

use super::allocator;

/// Time without work after which a mount is idle. With a shorter time, a busy mount gives back what it needs again at once;
/// with a longer one, an idle mount keeps memory.
const IDLE: Duration = Duration::from_secs(5);
/// Last time at which an idle mount gives memory back, in units of [`IDLE`]. Idle connections to a registry have ended by
/// then, and their buffers are free.
const LAST: u32 = 32;

/// Gives memory back each time after the number that `work` returns has changed and then stays the same: after [`IDLE`],
/// and then after twice the time, up to [`LAST`]. Ends when `work` returns none.
pub(super) async fn give_back_when_idle(work: impl Fn() -> Option<u64>) {
    let (mut last, mut quiet) = (None, 0_u32);
    while let Some(now) = work() {
        if last != Some(now) {
            (last, quiet) = (Some(now), 0);
        } else if quiet < LAST {
            quiet += 1;
            if quiet.is_power_of_two() {
                allocator::give_back();
                if let Err(error) = program::give_back() {
                    // Without /proc, the process only stays larger.
                    tracing::debug!("the pages of the program stay in the process: {error}");
                }
            }
        }
        tokio::time::sleep(IDLE).await;
    }
}

/// The pages of the program and its libraries.
mod program {
    use std::ffi::c_void;
    use std::io;

    use rustix::mm::{Advice, madvise};

    /// Takes the pages that have been executed out of the process. Each one comes back when it runs again.
    #[allow(unsafe_code)]
    pub(super) fn give_back() -> io::Result<()> {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        for (start, length) in maps.lines().filter_map(code) {
            let start = std::ptr::with_exposed_provenance_mut::<c_void>(start);
            // SAFETY: the range maps a file and cannot be written to, so its pages are those of the file. A page that is
            // used again is read from the file again.
            unsafe { madvise(start, length, Advice::LinuxDontNeed) }?;
        }
        Ok(())
    }

    /// Reads a line of `/proc/self/maps` (proc_pid_maps(5)): the address and the length of a range of a file that can be
    /// executed and not be written. None for all others.
    fn code(line: &str) -> Option<(usize, usize)> {
        let mut fields = line.split_ascii_whitespace();
        let (range, permissions) = (fields.next()?, fields.next()?);
        let path = fields.nth(3)?;
        if permissions != "r-xp" || !path.starts_with('/') {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(end, 16).ok()?;
        Some((start, end.checked_sub(start)?))
    }

    #[cfg(test)]
    mod tests {
        use super::code;

        #[test]
        fn only_code_of_files_is_given_back() {
            let of = |rest: &str| code(&format!("55d0a000-55d0c000 {rest}"));
            assert_eq!(
                of("r-xp 00679000 fe:00 5390387      /usr/bin/ocifs"),
                Some((0x55d0_a000, 0x2000))
            );
            assert_eq!(
                of("r-xp 00679000 fe:00 5390387      /usr/bin/ocifs (deleted)"),
                Some((0x55d0_a000, 0x2000))
            );
            assert_eq!(of("r--p 00679000 fe:00 5390387      /usr/bin/ocifs"), None);
            assert_eq!(of("rw-p 00679000 fe:00 5390387      /usr/bin/ocifs"), None);
            assert_eq!(of("rwxp 00679000 fe:00 5390387      /usr/bin/ocifs"), None);
            assert_eq!(of("r-xp 00000000 00:00 0            [vdso]"), None);
            assert_eq!(of("r-xp 00000000 00:00 0"), None);
            assert_eq!(code(""), None);
        }

        #[test]
        fn the_program_runs_on() {
            super::give_back().unwrap();
            assert_eq!(std::fs::read("/proc/self/comm").unwrap().last(), Some(&b'\n'));
        }
    }
}
