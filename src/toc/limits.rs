//! Limits of what a table of contents may hold.

/// Longest target of a symbolic link in bytes: `PATH_MAX` without the NUL, the longest that the kernel accepts.
pub(super) const SYMLINK_MAX: usize = 4095;

/// Limits of what a tar may cost, except memory. [`Toc::decode`](super::Toc::decode) accepts only tables within the
/// default limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most entries of one layer, plus fragments and chunks of its sparse files. An entry takes at least 512 bytes of
    /// tar.
    pub entries: usize,
    /// Longest data device in bytes. A virtual disk of EROFS blocks can hold 16 TiB for all layers together.
    pub device_size: u64,
    /// Longest pax header or GNU long name in bytes. Go's reader, which other engines use for all layers, has the
    /// same limit.
    pub payload: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 10_000_000,
            device_size: 8 << 40,
            payload: 1 << 20,
        }
    }
}
