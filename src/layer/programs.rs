//! The files that the programs of a layer need, looked up once right after the first pass, while the layer is local.
//!
//! If the layer is larger than the cache, a part of it is not local any more. Then some programs are not found. What was
//! found helps this host all the same. Other hosts get only complete lists, because the index of a layer follows from the
//! layer alone.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::program::Program;
use crate::store::{Durability, LayerDir, Store, StoreError, read_sealed};
use crate::toc::{DataLayout, EntryKind, PackedEntry, PackedToc};

const VERSION: u32 = 1;
/// Limit of the memory for the programs of one layer, in bytes. Programs beyond it are left out. Real layers have a
/// few thousand programs, of 300 bytes each.
const MOST_NOTED: usize = 8 << 20;
/// Size limit for reading a stored file. The files that are written are smaller.
const LARGEST_FILE: u64 = 4 * MOST_NOTED as u64;

/// Programs and libraries by the device offset of their content.
pub type LayerPrograms = BTreeMap<u64, Program>;

#[derive(Serialize, Deserialize)]
struct LayerProgramsFile {
    #[serde(rename = "ocifs-layer-programs")]
    version: u32,
    /// Whether all programs were found. Otherwise some of the bytes that tell were not local. Not stated for other hosts,
    /// which get only complete lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    complete: Option<bool>,
    programs: LayerPrograms,
}

/// What was found of a layer's programs.
#[derive(Debug)]
pub(super) struct FoundPrograms {
    pub(super) programs: LayerPrograms,
    /// Whether all bytes that tell could be read. The programs then follow from the layer alone.
    pub(super) complete: bool,
}

/// Looks up the programs of a layer. `read` fills a buffer from a device offset, or returns false.
pub(super) fn look(toc: &PackedToc, mut read: impl FnMut(u64, &mut [u8]) -> bool) -> FoundPrograms {
    let mut complete = true;
    let mut room = MOST_NOTED;
    let mut entries = toc.entries().ok();
    let candidates = std::iter::from_fn(|| {
        // The table was packed just now. If it cannot be read, the merge reports why.
        let entries = entries.as_mut()?;
        loop {
            if let Some(found) = candidate(&entries.next().ok()??) {
                return Some(found);
            }
        }
    });
    let programs = candidates.filter_map(|(device, size)| {
        let program = Program::look(size, &mut |offset, buf| {
            let within = offset.checked_add(buf.len() as u64).is_some_and(|end| end <= size);
            if !within {
                return false;
            }
            let done = read(device + offset, buf);
            complete &= done;
            done
        });
        Some((device, program?))
    });
    let fits = |(_, program): &(u64, Program)| {
        let left = room.checked_sub(program.size());
        room = left.unwrap_or_default();
        left.is_some()
    };
    let programs = programs.take_while(fits).collect();
    FoundPrograms { programs, complete }
}

/// Returns device offset and size of a file that may be a program or a library.
fn candidate(entry: &PackedEntry<'_>) -> Option<(u64, u64)> {
    let EntryKind::Regular(data) = &entry.kind else {
        return None;
    };
    let DataLayout::Flat { device } = data.layout else {
        return None;
    };
    let name = entry.path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    let library = name.windows(3).any(|part| part == b".so");
    (data.size > 0 && (library || entry.meta.mode & 0o111 != 0)).then_some((device, data.size))
}

/// Writes the programs of a layer to the directory of its index.
pub(super) fn keep(store: &Store, dir: &LayerDir, found: FoundPrograms) -> Result<(), StoreError> {
    let encoded = encoded(found.programs, Some(found.complete));
    store.publish_sealed(&dir.programs(), Durability::Lazy, |out| out.write_all(&encoded))
}

/// Returns a complete list of programs in the form in which other hosts get it.
pub(super) fn encoded_for_others(programs: LayerPrograms) -> Vec<u8> {
    encoded(programs, None)
}

fn encoded(programs: LayerPrograms, complete: Option<bool>) -> Vec<u8> {
    let file = LayerProgramsFile {
        version: VERSION,
        complete,
        programs,
    };
    serde_json::to_vec(&file).expect("numbers and strings")
}

/// Reads the programs of a layer from the directory of its index, as far as they were found. `None` if they were not
/// looked up, or cannot be read.
pub(crate) fn stored_programs(dir: &LayerDir) -> Option<LayerPrograms> {
    stored(dir).map(|found| found.programs)
}

/// Reads all programs of a layer from the directory of its index. `None` if some may be missing.
pub(super) fn all_stored_programs(dir: &LayerDir) -> Option<LayerPrograms> {
    stored(dir).filter(|found| found.complete).map(|found| found.programs)
}

fn stored(dir: &LayerDir) -> Option<FoundPrograms> {
    let path = dir.programs();
    let size = std::fs::metadata(&path).ok()?.len();
    if size > LARGEST_FILE {
        return None;
    }
    let file: LayerProgramsFile = serde_json::from_slice(&read_sealed(&path).ok()??).ok()?;
    (file.version == VERSION).then_some(FoundPrograms {
        programs: file.programs,
        // A list of an earlier version may lack programs.
        complete: file.complete.unwrap_or(false),
    })
}
