//! Blobs in local files: a whole file, or a range of one (a member of an uncompressed archive).
//!
//! Reads are positioned (`pread`) and run on the blocking pool, one piece at a time. A stream therefore holds one
//! piece in memory, however long it is, and stops when it is dropped. Blobs that are ranges of one file share its
//! file descriptor. A blob that is a whole file is opened for each stream, because an image can have more layers than
//! a process may have files open.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;

use super::{BlobError, BlobSource, ByteStream};
use crate::oci::Digest;
use crate::task;

/// Bytes read at a time. A larger piece costs memory for each stream. A smaller one costs more hand-overs to another
/// thread.
const PIECE: u64 = 512 << 10;

/// A blob that is a range of a local file.
#[derive(Debug, Clone)]
pub struct FileBlob {
    /// None if each stream opens the file.
    file: Option<Arc<File>>,
    path: Arc<Path>,
    digest: Digest,
    offset: u64,
    size: u64,
}

impl FileBlob {
    /// Returns the blob that is the whole file at `path`, of `size` bytes.
    pub fn whole(path: Arc<Path>, digest: Digest, size: u64) -> Self {
        Self {
            file: None,
            path,
            digest,
            offset: 0,
            size,
        }
    }

    /// Returns the blob of `size` bytes at `offset` in `file`. Error messages name `path`.
    pub fn new(file: Arc<File>, path: Arc<Path>, digest: Digest, offset: u64, size: u64) -> Self {
        Self {
            file: Some(file),
            path,
            digest,
            offset,
            size,
        }
    }

    /// Opens the file, if it is not open, and reads a piece. Blocks.
    fn read_first(&self, rest: &Range<u64>) -> Result<(Arc<File>, Bytes), BlobError> {
        let file = match &self.file {
            Some(file) => file.clone(),
            None => Arc::new(open_regular(&self.path)?.0),
        };
        let piece = self.read_next(&file, rest)?;
        Ok((file, piece))
    }

    /// Reads the next piece of `rest`. Blocks.
    fn read_next(&self, file: &File, rest: &Range<u64>) -> Result<Bytes, BlobError> {
        let len = PIECE.min(rest.end - rest.start);
        read_piece(file, &self.path, self.offset + rest.start, len)
    }
}

#[async_trait]
impl BlobSource for FileBlob {
    fn digest(&self) -> &Digest {
        &self.digest
    }

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        if range.start > range.end || range.end > self.size {
            return Err(BlobError::Invalid {
                what: format!("range {}..{} of blob {}", range.start, range.end, self.digest),
                reason: format!("the blob has {} bytes", self.size),
            });
        }
        if range.is_empty() {
            return Ok(futures::stream::empty().boxed());
        }
        let (blob, rest) = (self.clone(), range.clone());
        let (file, first) = blocking(&self.path, move || blob.read_first(&rest)).await?;
        let rest = range.start + first.len() as u64..range.end;
        let more = futures::stream::try_unfold((self.clone(), file, rest), |(blob, file, rest)| async move {
            if rest.is_empty() {
                return Ok(None);
            }
            let (reader, source, next) = (blob.clone(), file.clone(), rest.clone());
            let piece = blocking(&blob.path, move || reader.read_next(&source, &next)).await?;
            let rest = rest.start + piece.len() as u64..rest.end;
            Ok(Some((piece, (blob, file, rest))))
        });
        let pieces = futures::stream::once(async { Ok(first) }).chain(more);
        Ok(pieces.boxed())
    }
}

/// Runs blocking file work on the blocking pool.
pub(crate) async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, BlobError> {
    let done = task::blocking(work).await;
    done.map_err(|error| BlobError::io(path, std::io::Error::other(error)))?
}

/// Opens a regular file and returns it with its length. Anything else is refused before it is opened, because opening
/// a FIFO would wait for a writer.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), BlobError> {
    let found = std::fs::metadata(path).map_err(|e| BlobError::io(path, e))?;
    if !found.is_file() {
        return Err(BlobError::Invalid {
            what: path.display().to_string(),
            reason: "it is not a regular file".to_owned(),
        });
    }
    let file = File::open(path).map_err(|e| BlobError::io(path, e))?;
    let len = file.metadata().map_err(|e| BlobError::io(path, e))?.len();
    Ok((file, len))
}

/// Reads exactly `len` bytes at `offset`. The caller has checked `len` against the length that the file claims to
/// have.
pub(crate) fn read_piece(file: &File, path: &Path, offset: u64, len: u64) -> Result<Bytes, BlobError> {
    let mut piece = vec![0; usize::try_from(len).map_err(|_| too_short(path, offset, len))?];
    file.read_exact_at(&mut piece, offset)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => too_short(path, offset, len),
            _ => BlobError::io(path, error),
        })?;
    Ok(piece.into())
}

fn too_short(path: &Path, offset: u64, len: u64) -> BlobError {
    BlobError::Corrupt {
        what: PathBuf::from(path).display().to_string(),
        expected: format!("{len} bytes at offset {offset}"),
        actual: "the end of the file".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;

    fn blob(content: &[u8], offset: u64, size: u64) -> (tempfile::NamedTempFile, FileBlob) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let open = Arc::new(File::open(file.path()).unwrap());
        let blob = FileBlob::new(open, file.path().into(), Digest::of(content), offset, size);
        (file, blob)
    }

    async fn read(blob: &FileBlob, range: Range<u64>) -> Result<Vec<Bytes>, BlobError> {
        blob.read(range).await?.try_collect().await
    }

    #[tokio::test]
    async fn ranges_come_in_bounded_pieces() {
        let content: Vec<u8> = (0..3 * PIECE as u32 / 2).map(|i| (i % 251) as u8).collect();
        let size = content.len() as u64 - 10;
        let (_file, blob) = blob(&content, 10, size);
        let whole = read(&blob, 0..size).await.unwrap();
        assert_eq!(whole.iter().map(Bytes::len).max(), Some(PIECE as usize));
        assert_eq!(whole.concat(), content[10..]);
        for range in [
            0..0,
            size..size,
            0..1,
            size - 1..size,
            7..PIECE + 8,
            PIECE - 1..PIECE + 1,
        ] {
            let bytes = read(&blob, range.clone()).await.unwrap().concat();
            assert_eq!(
                bytes,
                content[10 + range.start as usize..10 + range.end as usize],
                "{range:?}"
            );
        }
    }

    #[tokio::test]
    async fn bad_ranges_and_short_files_are_errors() {
        let (file, blob) = blob(b"0123456789", 2, 8);
        for range in [0..9, 9..9, u64::MAX..u64::MAX] {
            assert!(matches!(read(&blob, range).await, Err(BlobError::Invalid { .. })));
        }
        file.as_file().set_len(6).unwrap();
        assert_eq!(read(&blob, 0..4).await.unwrap().concat(), b"2345");
        assert!(matches!(read(&blob, 0..5).await, Err(BlobError::Corrupt { .. })));
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        for path in [dir.path(), &fifo] {
            assert!(matches!(open_regular(path), Err(BlobError::Invalid { .. })));
        }
        assert!(matches!(
            open_regular(&dir.path().join("none")),
            Err(BlobError::Io { .. })
        ));
    }
}
