//! A log file with a size limit.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;

/// Largest size of the file in bytes. A larger limit keeps more of the past and takes more disk.
const LIMIT: u64 = 4 << 20;
/// Bytes at the end of the file that stay when it is shortened. A larger value keeps more but shortens more often.
const KEEP: u64 = 2 << 20;

/// A file opened for reading and appending. When it exceeds its limit, its older half is removed. The file is
/// shortened in place, because it may have been renamed since it was opened.
#[derive(Debug)]
pub(super) struct Bounded {
    file: File,
    limit: u64,
    keep: u64,
}

impl Bounded {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            limit: LIMIT,
            keep: KEEP,
        }
    }

    /// Shortens the file to the last `keep` bytes, without the partial line at their start.
    fn shorten(&mut self, length: u64) -> io::Result<()> {
        let keep = self.keep.min(length);
        let mut end = vec![0; usize::try_from(keep).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut end, length - keep)?;
        let first = end.iter().position(|&b| b == b'\n').map_or(0, |i| i + 1);
        self.file.set_len(0)?;
        self.file.write_all(&end[first..])
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all(bytes)?;
        let length = self.file.metadata()?.len();
        if length > self.limit {
            self.shorten(length)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_log_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut options = File::options();
        let file = options.create(true).append(true).read(true).open(&path).unwrap();
        let mut log = Bounded {
            file,
            limit: 1000,
            keep: 500,
        };
        for i in 0..1000 {
            writeln!(log, "line {i}").unwrap();
            let length = std::fs::metadata(&path).unwrap().len();
            assert!(length <= 1000, "{length} bytes after line {i}");
            if i == 500 {
                std::fs::rename(&path, directory.path().join("moved")).unwrap();
                std::fs::hard_link(directory.path().join("moved"), &path).unwrap();
            }
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() > 40, "{}", lines.len());
        for (i, line) in lines.iter().rev().enumerate() {
            assert_eq!(*line, format!("line {}", 999 - i));
        }
    }
}
