//! Errors of reading a tar or a stored table of contents.

use crate::memory::OverLimit;

/// Why a tar or a stored table of contents cannot be used. A retry with the same bytes never helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TocError {
    /// The first block is no tar header.
    #[error("not a tar: it begins with {seen}")]
    NotTar {
        /// The first bytes, and the format that they look like.
        seen: String,
    },
    /// A later block that must be a header has no valid checksum.
    #[error("damaged tar: no header at offset {offset}, after entry {after}")]
    BadHeader {
        /// Offset of the block in the tar.
        offset: u64,
        /// Name of the previous entry.
        after: String,
    },
    /// A header field or pax record that does not parse, or whose value is out of range.
    #[error("tar entry {entry} (header at offset {offset}) has an unusable {field}: {value}")]
    BadField {
        /// Name of the entry.
        entry: String,
        /// Offset of its header block.
        offset: u64,
        /// Header field or pax keyword.
        field: &'static str,
        /// The bytes of the field or record.
        value: String,
    },
    /// A pax header that does not consist of records.
    #[error("damaged pax header at tar offset {offset}: {reason}")]
    BadPax {
        /// Offset of the header block.
        offset: u64,
        /// What is wrong with the header.
        reason: &'static str,
    },
    /// A name, or the target of a hard link, that no file system could hold.
    #[error("tar entry {entry} (header at offset {offset}): {what} {problem}")]
    BadName {
        /// Name of the entry.
        entry: String,
        /// Offset of its header block.
        offset: u64,
        /// Whether the name or the link target is bad.
        what: &'static str,
        /// What is wrong with it.
        problem: NameProblem,
    },
    /// A sparse file whose map contradicts itself or the data.
    #[error("sparse tar entry {entry} (header at offset {offset}) has a bad map: {reason}")]
    BadSparse {
        /// Name of the entry.
        entry: String,
        /// Offset of its header block.
        offset: u64,
        /// What is wrong with the map.
        reason: &'static str,
    },
    /// A pax header or GNU long name that is longer than [`Limits::payload`](super::Limits::payload).
    #[error("the {what} at tar offset {offset} has {size} bytes, more than the {limit} that are accepted")]
    HeaderTooLarge {
        /// Kind of header.
        what: &'static str,
        /// Offset of the header block.
        offset: u64,
        /// Declared length.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A file that does not fit in the layer's data device.
    #[error("tar entry {entry} has {size} bytes and does not fit: a layer can have {limit} bytes of file content")]
    TooLarge {
        /// Name of the entry.
        entry: String,
        /// Logical size of the file in bytes.
        size: u64,
        /// The limit for the whole layer in bytes.
        limit: u64,
    },
    /// More entries and pieces of sparse files than the limit.
    #[error("at tar entry {entry}, the layer has more than {limit} entries and pieces of sparse files")]
    TooManyEntries {
        /// Name of the entry that exceeded the limit.
        entry: String,
        /// The limit.
        limit: usize,
    },
    /// The names, attributes and extents of the entries take more memory than is allowed.
    #[error("up to tar entry {entry}, what the image says of its files takes {source}")]
    TooMuchMemory {
        /// Name of the entry that exceeded the limit.
        entry: String,
        /// The limit.
        source: OverLimit,
    },
    /// The table cannot be compressed.
    #[error("the table of contents cannot be compressed: {reason}")]
    Pack {
        /// What the compressor reports.
        reason: String,
    },
    /// The tar ends too early.
    #[error("truncated tar: it ends at offset {offset} within {within}")]
    Truncated {
        /// Bytes that were read.
        offset: u64,
        /// What is incomplete.
        within: String,
    },
    /// Bytes that are no stored table, or a stored table of an unknown version.
    #[error("not a {what} this version of ocifs can read")]
    Format {
        /// Which table: the table of contents or the extent table.
        what: &'static str,
    },
    /// A stored table that does not match its checksum or breaks an invariant.
    #[error("corrupt {what}: {reason}")]
    Corrupt {
        /// Which table: the table of contents or the extent table.
        what: &'static str,
        /// What is wrong with the table.
        reason: &'static str,
    },
}

/// Why a name cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameProblem {
    /// The name contains a NUL byte. Only pax records can contain one.
    #[error("contains a NUL byte")]
    Nul,
    /// The name has a component longer than `NAME_MAX`.
    #[error("has a component longer than 255 bytes")]
    ComponentTooLong,
    /// The name is longer than `PATH_MAX`.
    #[error("is longer than 4096 bytes")]
    PathTooLong,
}

/// Formats bytes of a tar for a message: escaped, and shortened to 200 bytes.
pub(super) fn shown(bytes: &[u8]) -> String {
    const MAX: usize = 200;
    let head = &bytes[..bytes.len().min(MAX)];
    let dots = if head.len() < bytes.len() { "..." } else { "" };
    match std::str::from_utf8(head) {
        Ok(text) => format!("`{}{dots}`", text.escape_debug()),
        Err(_) => format!("`{}{dots}`", head.escape_ascii()),
    }
}

/// Describes bytes that are no tar, with the format they look like.
pub(super) fn describe(bytes: &[u8]) -> String {
    let magics: [(&[u8], &str); 9] = [
        (&[0x1f, 0x8b], "gzip"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (&[0xfd, b'7', b'z', b'X', b'Z'], "xz"),
        (b"BZh", "bzip2"),
        (b"PK\x03\x04", "zip"),
        (b"\x7fELF", "ELF"),
        (b"{", "JSON"),
        (b"<", "HTML or XML"),
        (b"hsqs", "squashfs"),
    ];
    let head = &bytes[..bytes.len().min(16)];
    match magics.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        Some((_, kind)) => format!("{} ({kind})", shown(head)),
        None => shown(head),
    }
}
