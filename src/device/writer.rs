//! Writes a whole device in order.

use std::path::PathBuf;
use std::sync::Arc;

use super::checksum::Checksummer;
use super::file::{Checks, DeviceFile};
use super::fragment::Seed;
use super::geometry::Geometry;
use super::joined::{Joined, footprint, is_long};
use super::{CacheBudget, DataDevice, DeviceError};
use crate::span::SpanMap;
use crate::store::Draft;

/// Writes a whole device in order, joining small files into large writes.
#[derive(Debug)]
pub struct DeviceWriter {
    draft: Draft,
    joined: Joined,
    summer: Checksummer,
    checks: Checks,
    path: PathBuf,
}

impl DeviceWriter {
    pub(super) fn new(draft: Draft, path: PathBuf, seed: Seed) -> Self {
        Self {
            draft,
            joined: Joined::default(),
            summer: Checksummer::new(seed),
            checks: Checks::default(),
            path,
        }
    }

    /// Says that the span with this number begins with the next content.
    pub fn span(&mut self, span: u32) {
        self.summer.span(span);
    }

    /// Adds content at a device offset that is not below any earlier one. Returns false if `budget` has no room for
    /// the content. In that case, and after an error, nothing was added: the caller tries again or gives the device
    /// up.
    pub fn write(&mut self, offset: u64, bytes: &[u8], budget: &CacheBudget) -> Result<bool, DeviceError> {
        if !self.joined.takes(offset, bytes) && !self.flush(budget)? {
            return Ok(false);
        }
        let wanted = if is_long(bytes) {
            footprint([(offset, bytes.len() as u64)])
        } else {
            0
        };
        let Some(_reserved) = budget.reserve(wanted) else {
            return Ok(false);
        };
        let added = self.joined.add(self.draft.file(), offset, bytes);
        added.map_err(DeviceError::at(&self.path))?;
        let checks = &mut self.checks;
        self.summer
            .content(offset, bytes, &mut |check, crc| checks.add(check, crc));
        Ok(true)
    }

    /// Writes the content that was added. Returns false if `budget` has no room for it. In that case, and after an
    /// error, the caller may try again.
    pub fn flush(&mut self, budget: &CacheBudget) -> Result<bool, DeviceError> {
        let Some(_reserved) = budget.reserve(self.joined.footprint()) else {
            return Ok(false);
        };
        let written = self.joined.write(self.draft.file());
        written.map_err(DeviceError::at(&self.path))?;
        Ok(true)
    }

    /// Publishes a device whose every span was written. Returns none if `budget` has no room for the rest. The device
    /// replaces an older one; a process that has the older one open keeps it.
    pub fn finish(self, spans: &dyn SpanMap, budget: &CacheBudget) -> Result<Option<DataDevice>, DeviceError> {
        self.finish_as(Geometry::of(spans), budget)
    }

    pub(super) fn finish_as(
        mut self,
        geometry: Geometry,
        budget: &CacheBudget,
    ) -> Result<Option<DataDevice>, DeviceError> {
        if !self.flush(budget)? {
            return Ok(None);
        }
        let checks = &mut self.checks;
        self.summer
            .close(geometry.size, &mut |check, crc| checks.add(check, crc));
        let path = self.path.clone();
        let publish = || {
            DeviceFile::write(self.draft.file(), &geometry, Some(&self.checks))?;
            let file = self.draft.publish(&path)?;
            DeviceFile::open(file, &path, true, geometry)?
                .ok_or_else(|| std::io::Error::other("it changed while it was written"))
        };
        let file = Arc::new(publish().map_err(DeviceError::at(&path))?);
        Ok(Some(DataDevice { file }))
    }
}
