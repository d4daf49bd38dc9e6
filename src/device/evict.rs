//! Eviction: keeps the store below a size.
//!
//! The evictor punches holes for the least recently used spans of all layers. It also deletes the least recently used
//! trees, and the first bytes of layers that did not come whole.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use super::file::{DeviceFile, SpanLock};
use crate::os::{gone, on_disk, open_regular, until_blocking};
use crate::store::{LayerDir, Store, StoreError, StoredTree};
use crate::toc::DEVICE_BLOCK;

/// What an eviction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Bytes on disk before.
    pub before: u64,
    /// Bytes on disk after.
    pub after: u64,
    /// Spans that became holes.
    pub spans: u64,
    /// Trees that were deleted.
    pub trees: u64,
}

impl Evicted {
    /// Returns the bytes on disk that came free.
    pub fn freed(&self) -> u64 {
        self.before.saturating_sub(self.after)
    }
}

/// What may be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Data of layers, and trees: keeps `Store::cache_usage` below a size.
    Cache,
    /// Data of layers only.
    Data,
}

/// Pause between two looks whether another process is done evicting. A longer pause delays a process that waits for
/// room; a shorter one costs more system calls.
const LOOK: Duration = Duration::from_millis(5);
/// Longest wait for another process that is evicting. A longer wait blocks the writer of a span. After a shorter one,
/// spans are not kept although room is about to come free.
const PATIENCE: Duration = Duration::from_secs(2);

/// Seconds that a tree counts as used later than it was. A tree takes a hundredth of its image's data, and without it
/// the next mount has to merge all layers again. A larger bonus evicts more spans that are still in use; a smaller
/// one costs more merges.
const TREE_BONUS: u64 = 7 * 24 * 3600;

/// A layer whose spans can be evicted.
struct Victim {
    dir: LayerDir,
    device: Arc<DeviceFile>,
}

/// Something that can be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Candidate {
    Span {
        victim: usize,
        span: u32,
    },
    Tree(usize),
    /// The first bytes of a layer that did not come whole.
    Partial(usize),
}

/// Evicts until the data that [`Scope`] names takes at most `target` bytes on disk, or until no more can go. One
/// process at a time evicts from a store, and sees what those before it have freed. Spans that another process fills
/// at the moment stay.
pub fn evict_to(store: &Store, target: u64, scope: Scope) -> Result<Evicted, StoreError> {
    let usage = || match scope {
        Scope::Cache => store.cache_usage(),
        Scope::Data => store.data_usage(),
    };
    let before = usage()?;
    let mut result = Evicted {
        before,
        after: before,
        ..Evicted::default()
    };
    if before <= target {
        return Ok(result);
    }
    let Some(_turn) = turn(store)? else { return Ok(result) };
    result.after = usage()?;
    let layers = store.layers()?;
    let victims: Vec<Victim> = layers.iter().cloned().filter_map(open).collect();
    let trees = match scope {
        Scope::Cache => store.trees()?,
        Scope::Data => Vec::new(),
    };
    // Opening the victims has removed the devices that are of no use.
    result.after = usage()?.min(result.after);
    for (_, candidate) in candidates(&victims, &trees, &layers) {
        if result.after <= target {
            break;
        }
        let freed = match candidate {
            Candidate::Partial(layer) => {
                let bytes = layers[layer].partial_usage();
                match layers[layer].remove_partial() {
                    Ok(removed) => u64::from(removed) * bytes,
                    Err(error) => {
                        tracing::warn!(%error, "cannot remove what was kept of a layer");
                        0
                    }
                }
            }
            Candidate::Tree(tree) => {
                gone(std::fs::remove_file(&trees[tree].path))
                    .map_err(|e| StoreError::io("remove", &trees[tree].path, e))?;
                result.trees += 1;
                trees[tree].bytes
            }
            Candidate::Span { victim, span } => match evict_span(&victims[victim].device, span) {
                Ok(freed) => {
                    result.spans += u64::from(freed.is_some());
                    freed.unwrap_or(0)
                }
                Err(error) => {
                    tracing::warn!(layer = %victims[victim].dir.path().display(), span, %error, "cannot evict a span");
                    if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) {
                        // No other span could be evicted either: all spans would be lost, and no bytes would come
                        // free.
                        break;
                    }
                    0
                }
            },
        };
        result.after = result.after.saturating_sub(freed);
    }
    result.after = usage()?;
    Ok(result)
}

/// Returns the right to evict. None if another process has it and does not finish in time.
fn turn(store: &Store) -> Result<Option<Flock<File>>, StoreError> {
    let (file, path) = store.eviction_lock()?;
    let mut file = Some(file);
    let locked = until_blocking(LOOK, PATIENCE, || match file.take() {
        None => Ok(None),
        Some(open) => match Flock::lock(open, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((open, Errno::EWOULDBLOCK)) => {
                file = Some(open);
                Ok(None)
            }
            Err((_, error)) => Err(StoreError::io("lock", &path, error.into())),
        },
    })?;
    if locked.is_none() {
        tracing::warn!(path = %path.display(), "another process is evicting and does not get done");
    }
    Ok(locked)
}

/// Returns everything that can be evicted with the time of its last use, least recently used first.
fn candidates(victims: &[Victim], trees: &[StoredTree], layers: &[LayerDir]) -> Vec<(u64, Candidate)> {
    let mut candidates = Vec::new();
    for (number, victim) in victims.iter().enumerate() {
        match victim
            .device
            .file()
            .and_then(|file| victim.device.read_records(&file, 0..victim.device.geometry().spans()))
        {
            Ok(records) => {
                let present = records.iter().zip(0..).filter(|(record, _)| record.present);
                let spans = present.map(|(record, span)| (record.last_used, Candidate::Span { victim: number, span }));
                candidates.extend(spans);
            }
            Err(error) => {
                tracing::warn!(layer = %victim.dir.path().display(), %error, "cannot evict from this layer");
            }
        }
    }
    candidates.extend(trees.iter().enumerate().map(|(number, tree)| {
        let last_used = tree.last_used.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        (last_used.saturating_add(TREE_BONUS), Candidate::Tree(number))
    }));
    let partials = layers.iter().enumerate();
    candidates.extend(partials.filter_map(|(number, layer)| Some((layer.partial_used()?, Candidate::Partial(number)))));
    candidates.sort_unstable();
    candidates
}

/// Opens what eviction needs. Removes a device whose layer has no index, or that is damaged as a whole: no reader can
/// use it.
fn open(dir: LayerDir) -> Option<Victim> {
    let opened = open_regular(File::options().read(true).write(true), &dir.data());
    match opened.and_then(|file| DeviceFile::open_unknown(file, &dir.data())) {
        Ok(Some(device)) if dir.spans().exists() => Some(Victim {
            dir,
            device: Arc::new(device),
        }),
        Ok(_) => {
            remove_useless(&dir);
            None
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(layer = %dir.path().display(), %error, "cannot evict from this layer");
            None
        }
    }
}

/// Removes the device of a layer, unless a process is indexing the layer.
fn remove_useless(dir: &LayerDir) {
    let Ok(file) = dir.lock_file() else { return };
    // Hold the lock during the removal: no other process can then be about to finish a pass over the layer.
    let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return;
    };
    if let Err(error) = gone(std::fs::remove_file(dir.data())) {
        tracing::warn!(path = %dir.data().display(), %error, "cannot remove a useless data device");
    }
}

/// Marks a span absent and clears the checksums of its content. The caller holds its lock.
pub(super) fn clear(device: &DeviceFile, span: u32) -> io::Result<()> {
    device.write_record(span, false, 0)?;
    let range = device.geometry().range(span);
    device.clear_checks(range.start.div_ceil(DEVICE_BLOCK)..range.end.div_ceil(DEVICE_BLOCK))
}

/// Returns the lock of a neighbouring span, if the span exists, is absent, and no other process is filling it.
fn hold_absent(device: &Arc<DeviceFile>, span: Option<u32>) -> io::Result<Option<SpanLock>> {
    let Some(span) = span.filter(|&span| span < device.geometry().spans()) else {
        return Ok(None);
    };
    let Some(lock) = device.try_lock_one(span)? else {
        return Ok(None);
    };
    Ok((!device.record(span)?.present).then_some(lock))
}

/// Makes a span a hole. Returns the bytes on disk that came free, or none if the span stays.
pub(super) fn evict_span(device: &Arc<DeviceFile>, span: u32) -> io::Result<Option<u64>> {
    let Some(_lock) = device.try_lock_one(span)? else {
        return Ok(None);
    };
    if !device.record(span)?.present {
        return Ok(None);
    }
    clear(device, span)?;
    let usage = || device.file()?.metadata().map(|m| on_disk(&m));
    let before = usage()?;
    let geometry = device.geometry();
    let range = geometry.range(span);
    // Only whole blocks come free. A block that is shared with a neighbour goes when both spans are gone. If the
    // neighbour shares the block with a further span, that span may still be present. Such a block stays.
    let shares = |other: Option<u32>, address: u64| -> io::Result<(bool, Option<SpanLock>)> {
        if address.is_multiple_of(DEVICE_BLOCK) {
            return Ok((false, None));
        }
        let block = address - address % DEVICE_BLOCK;
        let lock = hold_absent(device, other)?;
        let alone = other.is_some_and(|other| {
            let range = geometry.range(other);
            range.start <= block || range.end >= block + DEVICE_BLOCK
        });
        Ok((lock.is_none() || !alone, lock))
    };
    let (keep_first, _first) = shares(span.checked_sub(1), range.start)?;
    let (keep_last, _last) = shares(Some(span + 1), range.end)?;
    let start = match keep_first {
        true => range.start.next_multiple_of(DEVICE_BLOCK),
        false => range.start - range.start % DEVICE_BLOCK,
    };
    let end = match keep_last {
        true => range.end - range.end % DEVICE_BLOCK,
        false => range.end.next_multiple_of(DEVICE_BLOCK),
    };
    if start < end {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&*device.file()?, mode, start as i64, (end - start) as i64)?;
    }
    Ok(Some(before.saturating_sub(usage()?)))
}
