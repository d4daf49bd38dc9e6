//! A tar as a file whose members are read in place: images in archives are made of it.
//!
//! One walk over the headers finds the members. They are then ranges of the file. A tar that is itself compressed is first
//! unpacked to an unlinked temporary file.

mod members;

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

pub(crate) use self::members::Member;
use self::members::{FindError, Members};
use crate::blob::BlobError;
use crate::blob::file::{open_regular, read_piece};
use crate::index::{ZSTD_WINDOW_LOG_MAX, ZSTD_WINDOW_TOO_LARGE};
use crate::oci::shown;

/// Bytes read at a time for unpacking and hashing.
const BUFFER: usize = 256 << 10;
/// Most bytes that an archive may unpack to for each of its own. Deflate cannot exceed this ratio. zstd can, but not
/// with layers that are worth packing. A larger ratio lets a small archive fill the disk.
const MAX_RATIO: u64 = 1032;
/// Bytes that any archive may unpack to: a small archive may have a few large and empty files. A larger bound lets a
/// small archive take more of the disk; a smaller one refuses such images.
const ALWAYS_UNPACKED: u64 = 1 << 30;

/// Bytes that tell the compression: as many as the longest magic has.
const SNIFFED: usize = 10;

/// The compression of some bytes, told by the first of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ArchiveCompression {
    None,
    Gzip,
    Zstd,
    Xz,
    Bzip2,
}

impl ArchiveCompression {
    pub(crate) fn sniff(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0x00, ..] => Self::Xz,
            // The magic of a block or of the end follows. Without it, the first bytes could begin a file name in a
            // tar.
            [b'B', b'Z', b'h', b'1'..=b'9', b'1', b'A', b'Y', b'&', b'S', b'Y', ..] => Self::Bzip2,
            [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, 0x45, 0x38, 0x50, 0x90, ..] => Self::Bzip2,
            _ => Self::None,
        }
    }
}

/// An uncompressed archive, and where its members are.
#[derive(Debug)]
pub(crate) struct Archive {
    /// The archive, or the unlinked file it was unpacked to.
    pub file: Arc<File>,
    /// Length of `file`.
    len: u64,
    /// The path that errors name.
    pub path: Arc<Path>,
    members: Members,
}

impl Archive {
    pub fn open(path: Arc<Path>) -> Result<Self, BlobError> {
        let (file, packed_len) = open_regular(&path).map_err(|error| match error {
            BlobError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => BlobError::NotFound {
                what: format!("archive {}", path.display()),
                hint: None,
            },
            other => other,
        })?;
        let mut start = [0; SNIFFED];
        let got = file.read_at(&mut start, 0).map_err(|e| BlobError::io(&path, e))?;
        let most = most_unpacked(packed_len);
        let file = match ArchiveCompression::sniff(&start[..got]) {
            ArchiveCompression::None => file,
            ArchiveCompression::Gzip => unpack(
                &path,
                flate2::read::MultiGzDecoder::new(BufReader::with_capacity(BUFFER, file)),
                most,
            )?,
            ArchiveCompression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(file).map_err(|e| BlobError::io(&path, e))?;
                decoder
                    .window_log_max(ZSTD_WINDOW_LOG_MAX)
                    .map_err(|e| BlobError::io(&path, e))?;
                unpack(&path, decoder, most)?
            }
            ArchiveCompression::Xz => return Err(packed(&path, "xz")),
            ArchiveCompression::Bzip2 => return Err(packed(&path, "bzip2")),
        };
        let len = file.metadata().map_err(|e| BlobError::io(&path, e))?.len();
        let members = Members::of(&file).map_err(|error| BlobError::Invalid {
            what: format!("archive {}", path.display()),
            // The library quotes the bytes that it could not read.
            reason: format!("it is no tar: {}", shown(&error.to_string())),
        })?;
        Ok(Self {
            file: Arc::new(file),
            len,
            path,
            members,
        })
    }

    /// Finds a file of the archive by name, through links.
    pub fn member(&self, name: &str) -> Result<Member, BlobError> {
        let invalid = |reason: String| BlobError::Invalid {
            what: format!("`{}` in archive {}", shown(name), self.path.display()),
            reason,
        };
        let member = self.members.find(name.as_bytes()).map_err(|error| match error {
            FindError::Missing => BlobError::NotFound {
                what: format!("`{}` in archive {}", shown(name), self.path.display()),
                hint: Some("the archive is incomplete".to_owned()),
            },
            FindError::Circle | FindError::Sparse | FindError::TooLong => invalid(error.to_string()),
        })?;
        if member.offset.checked_add(member.size).is_none_or(|end| end > self.len) {
            return Err(invalid("the archive ends before it: it is truncated".to_owned()));
        }
        Ok(member)
    }

    /// Returns whether there is a file of that name.
    pub fn has(&self, name: &str) -> bool {
        self.members.find(name.as_bytes()).is_ok()
    }

    /// Reads a small member whole.
    pub fn read_small(&self, name: &str, max: usize) -> Result<Bytes, BlobError> {
        let member = self.member(name)?;
        if member.size > max as u64 {
            return Err(BlobError::Invalid {
                what: format!("`{}` in archive {}", shown(name), self.path.display()),
                reason: format!("it has {} bytes, more than the {max} allowed", member.size),
            });
        }
        read_piece(&self.file, &self.path, member.offset, member.size)
    }

    /// Returns the first bytes of a member; fewer if the member is shorter.
    pub fn start(&self, member: &Member) -> Result<Bytes, BlobError> {
        read_piece(&self.file, &self.path, member.offset, member.size.min(SNIFFED as u64))
    }

    /// Hands all bytes of a member, in order, to `take`.
    pub fn for_each_piece(&self, member: &Member, mut take: impl FnMut(&[u8])) -> Result<(), BlobError> {
        let (mut at, end) = (member.offset, member.offset + member.size);
        while at < end {
            let piece = read_piece(&self.file, &self.path, at, (end - at).min(BUFFER as u64))?;
            take(&piece);
            at += piece.len() as u64;
        }
        Ok(())
    }
}

fn packed(path: &Path, with: &str) -> BlobError {
    BlobError::Unsupported {
        what: format!("archive {}", path.display()),
        reason: format!("it is compressed with {with}: unpack it first (`{with} --decompress --keep FILE`)"),
    }
}

/// Returns the most bytes that an archive of `len` bytes may unpack to.
fn most_unpacked(len: u64) -> u64 {
    len.saturating_mul(MAX_RATIO).max(ALWAYS_UNPACKED)
}

/// Unpacks a compressed archive into a file without a name. The file goes when it is closed.
fn unpack(path: &Path, mut from: impl Read, most: u64) -> Result<File, BlobError> {
    let dir = std::env::temp_dir();
    let mut file = unnamed_file(&dir).map_err(|e| BlobError::io(&dir, e))?;
    tracing::info!(archive = %path.display(), into = %dir.display(), "unpacking a compressed archive");
    let mut buffer = vec![0; BUFFER];
    let mut left = most;
    loop {
        let got = match from.read(&mut buffer) {
            Ok(0) => return Ok(file),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.to_string().contains(ZSTD_WINDOW_TOO_LARGE) => {
                return Err(BlobError::Unsupported {
                    what: format!("archive {}", path.display()),
                    reason: format!(
                        "its zstd window is larger than {} MiB: unpack it first (`zstd --decompress --long=31 --keep FILE`)",
                        (1 << ZSTD_WINDOW_LOG_MAX) >> 20
                    ),
                });
            }
            Err(error) => {
                return Err(BlobError::Corrupt {
                    what: format!("archive {}", path.display()),
                    expected: "compressed data".to_owned(),
                    actual: error.to_string(),
                });
            }
        };
        left = left.checked_sub(got as u64).ok_or_else(|| BlobError::Unsupported {
            what: format!("archive {}", path.display()),
            reason: format!(
                "it unpacks to more than {} MiB, far more than images of its size do: unpack it first if that is meant",
                most >> 20
            ),
        })?;
        io::Write::write_all(&mut file, &buffer[..got]).map_err(|error| no_room(&dir, error))?;
    }
}

fn no_room(dir: &Path, error: io::Error) -> BlobError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            let text =
                format!("no room to unpack a compressed archive: set TMPDIR elsewhere or unpack it first ({error})");
            BlobError::io(dir, io::Error::new(error.kind(), text))
        }
        _ => BlobError::io(dir, error),
    }
}

fn unnamed_file(dir: &Path) -> io::Result<File> {
    let name = dir.join(format!("ocifs-{}-{:016x}", std::process::id(), fastrand::u64(..)));
    // Only this user may read the unpacked file. The name must be new, because all users may write to the directory.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&name)?;
    std::fs::remove_file(&name)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_known_by_its_first_bytes() {
        for (start, is) in [
            (&b""[..], ArchiveCompression::None),
            (b"etc/passwd\0", ArchiveCompression::None),
            (b"\x1f\x8b\x08\x00", ArchiveCompression::Gzip),
            (b"\x1f\x8b", ArchiveCompression::None),
            (b"\x28\xb5\x2f\xfd\x00", ArchiveCompression::Zstd),
            (b"\x5a\x2a\x4d\x18\x00", ArchiveCompression::Zstd),
            (b"\xfd7zXZ\x00\x00\x04", ArchiveCompression::Xz),
            (b"BZh91AY&SY\x12", ArchiveCompression::Bzip2),
            (b"BZh9\x17\x72\x45\x38\x50\x90\0", ArchiveCompression::Bzip2),
            (b"BZh9/file\0\0", ArchiveCompression::None),
        ] {
            assert_eq!(ArchiveCompression::sniff(start), is, "{start:?}");
        }
    }

    #[test]
    fn what_an_archive_unpacks_to_is_limited() {
        let path = Path::new("a.tar.gz");
        let most = 1 << 20;
        let unpacked = unpack(path, io::repeat(0).take(most), most).unwrap();
        assert_eq!(unpacked.metadata().unwrap().len(), most);
        let error = unpack(path, io::repeat(0).take(most + 1), most).unwrap_err();
        assert!(matches!(error, BlobError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("it unpacks to more than 1 MiB"), "{error}");
        assert_eq!(most_unpacked(0), 1 << 30);
        assert_eq!(most_unpacked(1 << 30), 1032 << 30);
        assert_eq!(most_unpacked(u64::MAX), u64::MAX);
    }

    #[test]
    fn the_window_of_a_zstd_archive_is_limited_as_that_of_a_layer() {
        // The frame has one empty raw block. Its sixth byte is the window descriptor (RFC 8878, 3.1.1.1.2).
        let open = |window_log: u8| {
            let file = tempfile::NamedTempFile::new().unwrap();
            let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, (window_log - 10) << 3, 0x01, 0x00, 0x00];
            std::fs::write(file.path(), frame).unwrap();
            Archive::open(file.path().into()).map(|_| ())
        };
        open(27).unwrap();
        let error = open(28).unwrap_err();
        assert!(matches!(error, BlobError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("larger than 128 MiB"), "{error}");
    }

    #[test]
    fn a_full_disk_says_what_to_do() {
        let error = no_room(Path::new("/tmp"), io::Error::from(io::ErrorKind::StorageFull)).to_string();
        assert!(
            error.starts_with("/tmp: no room") && error.contains("set TMPDIR"),
            "{error}"
        );
    }
}
