//! What the programs of a layer need, looked up once while all of the layer is here, right after the first pass.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::Layer;
use crate::oci::Digest;
use crate::program::Program;
use crate::store::{Durability, Store, StoreError, read_sealed};
use crate::toc::{DataLayout, EntryKind, PackedEntry, PackedToc};

const VERSION: u32 = 1;
/// What is noted of the programs of one layer takes about so much memory at most; more programs are left out. Real layers
/// have a few thousand, of 300 bytes each.
const MOST_NOTED: usize = 8 << 20;
/// A larger file is not read; those that are written are smaller.
const LARGEST_FILE: u64 = 4 * MOST_NOTED as u64;

/// Programs and libraries by the device offset of their content.
pub type Programs = HashMap<u64, Program>;

#[derive(Serialize, Deserialize)]
struct File {
    #[serde(rename = "ocifs-layer-programs")]
    version: u32,
    programs: Programs,
}

/// Looks into the programs of a layer whose content is on its device.
pub(super) fn look(toc: &PackedToc, layer: &Layer) -> Programs {
    let mut room = MOST_NOTED;
    let mut entries = toc.entries().ok();
    let candidates = std::iter::from_fn(|| {
        // It was packed just now; if it cannot be read the merge says why.
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
            within && layer.peek(device + offset, buf)
        });
        Some((device, program?))
    });
    let fits = |(_, program): &(u64, Program)| {
        let left = room.checked_sub(program.size());
        room = left.unwrap_or_default();
        left.is_some()
    };
    programs.take_while(fits).collect()
}

/// Device offset and size of a file that may be a program or a library.
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

/// Keeps them in the store.
pub(super) fn keep(store: &Store, layer: &Digest, programs: Programs) -> Result<(), StoreError> {
    let dir = store.layer(layer).ok_or(StoreError::Unavailable)?;
    let file = File {
        version: VERSION,
        programs,
    };
    let encoded = serde_json::to_vec(&file).expect("numbers and strings");
    store.publish_sealed(&dir.programs(), Durability::Lazy, |out| out.write_all(&encoded))
}

/// What the store has of a layer; nothing if that was not looked up, or cannot be read.
pub fn stored_programs(store: &Store, layer: &Digest) -> Option<Programs> {
    let path = store.layer(layer)?.programs();
    let size = std::fs::metadata(&path).ok()?.len();
    if size > LARGEST_FILE {
        return None;
    }
    let file: File = serde_json::from_slice(&read_sealed(&path).ok()??).ok()?;
    (file.version == VERSION).then_some(file.programs)
}
