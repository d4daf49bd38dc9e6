//! Checks a whole device.

use std::fs::File;
use std::io;

use super::evict::clear;
use super::file::DeviceFile;
use super::geometry::Geometry;
use super::{DataDevice, DeviceError, Found};
use crate::os::{clear_way, gone, is_foreign, open_regular};
use crate::span::SpanMap;
use crate::store::LayerDir;

/// What a check of a device found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    /// Spans that are present and whose bytes are those that were written.
    pub good: u64,
    /// Spans that were damaged and that the check dropped. The next reader of such a span fetches it again.
    pub dropped: u64,
    /// Bytes of content that were read and compared.
    pub bytes: u64,
}

/// Compares every span that is present in a layer's device with its checksums, and drops damaged spans. Removes a
/// device that is damaged as a whole, and counts it as one span. Leaves out spans that another process fills at the
/// moment.
pub fn verify(dir: &LayerDir, spans: &dyn SpanMap) -> Result<Verified, DeviceError> {
    let path = dir.data();
    verify_file(dir, spans).map_err(DeviceError::at(&path))
}

fn verify_file(dir: &LayerDir, spans: &dyn SpanMap) -> io::Result<Verified> {
    let mut verified = Verified::default();
    let file = match open_regular(File::options().read(true).write(true), &dir.data()) {
        Ok(file) => file,
        Err(e) if is_foreign(&e) => {
            clear_way(&dir.data())?;
            verified.dropped = 1;
            return Ok(verified);
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(verified),
        Err(e) => return Err(e),
    };
    let Some(file) = DeviceFile::open(file, &dir.data(), true, Geometry::of(spans))? else {
        gone(std::fs::remove_file(dir.data()))?;
        verified.dropped = 1;
        return Ok(verified);
    };
    let device = DataDevice { file: file.into() };
    let mut buffer = Vec::new();
    for span in 0..spans.span_count() {
        let Some(_lock) = device.file.try_lock_one(span)? else {
            continue;
        };
        if !device.is_present(span)? {
            continue;
        }
        let mut bytes = 0;
        let mut good = true;
        for piece in spans.pieces(span) {
            // A piece is no longer than its span.
            buffer.resize(piece.len as usize, 0);
            good &= device.read_unnoticed(piece.device, &mut buffer, &|_| true)? == Found::Bytes;
            bytes += piece.len;
        }
        if good {
            verified.good += 1;
            verified.bytes += bytes;
        } else {
            clear(&device.file, span)?;
            verified.dropped += 1;
        }
    }
    Ok(verified)
}
