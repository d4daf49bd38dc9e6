//! Keeps the store's data devices below a size: the least recently used spans of all layers become holes again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::libc;

use super::presence::{PresenceMap, SpanLock, State};
use crate::index::{SpanId, SpanIndex};
use crate::store::{FileBytes, LayerDir, Store, StoreError, gone, map_file};
use crate::toc::{DEVICE_BLOCK, ExtentTable};

/// What an eviction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Bytes on disk before.
    pub before: u64,
    /// Bytes on disk after.
    pub after: u64,
    /// Spans that became holes.
    pub spans: u64,
}

/// A layer whose spans can be evicted.
struct Victim {
    dir: LayerDir,
    presence: Arc<PresenceMap>,
    index: SpanIndex,
    extents: ExtentTable<FileBytes>,
}

/// Evicts until the data devices of all layers together take at most `target` bytes on disk, or nothing more can go.
/// Spans that somebody is filling at the moment stay.
pub fn evict_to(store: &Store, target: u64) -> Result<Evicted, StoreError> {
    let layers = store.layers()?;
    let usage = || layers.iter().map(LayerDir::data_usage).sum();
    let before = usage();
    let mut result = Evicted {
        before,
        after: before,
        spans: 0,
    };
    if before <= target {
        return Ok(result);
    }
    let victims: Vec<Victim> = layers.iter().filter_map(open).collect();
    // Devices that are of no use to anybody are gone by now.
    result.after = usage();
    let mut candidates = Vec::new();
    for (layer, victim) in victims.iter().enumerate() {
        for span in 0..victim.presence.len() {
            if victim.presence.get(span).state != State::Absent {
                candidates.push((victim.presence.last_used(span), layer, span));
            }
        }
    }
    candidates.sort_unstable();
    for (_, layer, span) in candidates {
        if result.after <= target {
            break;
        }
        match evict_span(&victims[layer], span) {
            Ok(0) => {}
            Ok(freed) => {
                result.spans += 1;
                result.after = result.after.saturating_sub(freed);
            }
            Err(error) => {
                tracing::warn!(layer = %victims[layer].dir.path().display(), span, %error, "cannot evict a span");
                if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
                    // It would be so for every other span: all would be lost and nothing gained.
                    break;
                }
            }
        }
    }
    result.after = usage();
    Ok(result)
}

/// Opens what eviction needs. A device whose layer has no index is of no use to anybody, so it goes as a whole.
fn open(dir: &LayerDir) -> Option<Victim> {
    let file = File::options().read(true).write(true).open(dir.data()).ok()?;
    let opened = (|| -> io::Result<_> {
        let (spans, extents) = (map_file(&dir.spans())?, map_file(&dir.extents())?);
        let index = SpanIndex::open(spans).map_err(io::Error::other)?;
        let extents = ExtentTable::open(extents).map_err(io::Error::other)?;
        let presence = PresenceMap::open(file, super::shape(&index, extents.device_size()))?;
        Ok((index, extents, presence))
    })();
    match opened {
        Ok((index, extents, Some(presence))) => Some(Victim {
            dir: dir.clone(),
            presence: Arc::new(presence),
            index,
            extents,
        }),
        // Of another index: whoever opens the layer replaces it.
        Ok((_, _, None)) => None,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            remove_orphan(dir);
            None
        }
        Err(error) => {
            tracing::warn!(layer = %dir.path().display(), %error, "cannot evict from this layer");
            None
        }
    }
}

/// Removes the device of a layer that is not indexed and that nobody is indexing.
fn remove_orphan(dir: &LayerDir) {
    let Ok(file) = dir.lock_file() else { return };
    // Held over the second look and the removal: with it, nobody can be about to finish a pass.
    let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return;
    };
    if !dir.spans().exists()
        && let Err(error) = gone(std::fs::remove_file(dir.data()))
    {
        tracing::warn!(path = %dir.data().display(), %error, "cannot remove a data device without index");
    }
}

/// The lock of a neighbouring span, if that one exists, is absent, and nobody is filling it.
fn hold_absent(victim: &Victim, span: Option<u32>) -> Option<(u32, SpanLock)> {
    let span = span.filter(|&span| span < victim.presence.len())?;
    let lock = victim.presence.try_lock_one(span).ok()??;
    (victim.presence.get(span).state == State::Absent).then_some((span, lock))
}

/// Whether all content in a range of the device is of spans that are gone.
fn is_gone(victim: &Victim, range: Range<u64>, gone: impl Fn(u32) -> bool) -> bool {
    let mut pieces = victim.extents.pieces_in_device(range);
    pieces.all(|piece| {
        let span = |offset| victim.index.span_at(offset).map(|span| span.0);
        match (span(piece.tar), span(piece.tar + piece.len - 1)) {
            (Some(first), Some(last)) => (first..=last).all(&gone),
            _ => false,
        }
    })
}

/// Punches the holes of one span; returns the bytes on disk that came free.
fn evict_span(victim: &Victim, span: u32) -> std::io::Result<u64> {
    let Some(_lock) = victim.presence.try_lock_one(span)? else {
        return Ok(0);
    };
    if !victim.presence.evict(span) {
        return Ok(0);
    }
    let neighbours = [span.checked_sub(1), Some(span + 1)].map(|other| hold_absent(victim, other));
    let gone = |other: u32| other == span || neighbours.iter().flatten().any(|(held, _)| *held == other);
    let usage = || victim.presence.file().metadata().map(|m| m.blocks() * 512);
    let before = usage()?;
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for extent in victim.extents.pieces_in_tar(victim.index.tar_range(SpanId(span))) {
        let (mut start, mut end) = (extent.device, extent.device + extent.len);
        // Only whole blocks come free, so the hole takes in what else its first and last block hold: padding, or content
        // that is gone as well. A block shared with a span that is still there stays; its bytes of this span become zeros.
        let block = start - start % DEVICE_BLOCK;
        if is_gone(victim, block..start, gone) {
            start = block;
        }
        let block = end.next_multiple_of(DEVICE_BLOCK);
        if is_gone(victim, end..block, gone) {
            end = block;
        }
        fallocate(victim.presence.file(), mode, start as i64, (end - start) as i64)?;
    }
    Ok(before.saturating_sub(usage()?).max(1))
}
