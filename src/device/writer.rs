//! Writing a whole device in order.

use std::path::PathBuf;
use std::sync::Arc;

use super::checksum::{Checksummer, Seed};
use super::file::{Checks, DeviceFile};
use super::geometry::Geometry;
use super::joined::{Joined, footprint, is_long};
use super::{CacheBudget, DataDevice, DeviceError};
use crate::index::SpanIndex;
use crate::store::Draft;
use crate::toc::ExtentTable;

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

    /// The content that comes next belongs to this span, by its number.
    pub fn span(&mut self, span: u32) {
        self.summer.span(span);
    }

    /// Adds content at a device offset not below any earlier one. False if `budget` has no room for it. Then, and after an error,
    /// nothing was added: it may be tried again, or the device cannot be finished.
    pub fn write(&mut self, offset: u64, bytes: &[u8], budget: &CacheBudget) -> Result<bool, DeviceError> {
        if !self.joined.takes(offset, bytes) && !self.flush(budget)? {
            return Ok(false);
        }
        if is_long(bytes) && !budget.reserve(footprint([(offset, bytes.len() as u64)])) {
            return Ok(false);
        }
        let added = self.joined.add(self.draft.file(), offset, bytes);
        added.map_err(DeviceError::at(&self.path))?;
        let checks = &mut self.checks;
        self.summer
            .content(offset, bytes, &mut |check, crc| checks.add(check, crc));
        Ok(true)
    }

    /// Writes what was added. False if `budget` has no room for it; then, and after an error, it may be tried again.
    pub fn flush(&mut self, budget: &CacheBudget) -> Result<bool, DeviceError> {
        if !budget.reserve(self.joined.footprint()) {
            return Ok(false);
        }
        let written = self.joined.write(self.draft.file());
        written.map_err(DeviceError::at(&self.path))?;
        Ok(true)
    }

    /// Publishes a device whose every span was written; none if `budget` has no room for the rest. It takes the place of an
    /// older one, which whoever has it open keeps.
    pub fn finish<B: AsRef<[u8]>>(
        self,
        index: &SpanIndex,
        extents: &ExtentTable<B>,
        budget: &CacheBudget,
    ) -> Result<Option<DataDevice>, DeviceError> {
        self.finish_as(Geometry::new(index, extents), budget)
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
