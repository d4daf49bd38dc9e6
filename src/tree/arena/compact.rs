//! Compaction: removes inodes without a name, and moves the others together.

use super::{Arena, ArenaKind, Full, Id, NONE, TargetText};

/// Arenas of fewer bytes are not compacted, because the memory saved is not worth the time.
const WORTH: usize = 8 << 20;

impl Arena {
    /// Compacts the arena if the memory saved is worth the time: the arena is larger than `WORTH` and has doubled
    /// since the last compaction. If the arena takes more than half of the allowance, growth by a quarter is enough.
    /// Only inodes of the tree at `root` remain, and their ids change. Returns the new id of the root.
    pub fn compact_if_worth(&mut self, root: Id) -> Result<Id, Full> {
        let bytes = self.bytes();
        let crowded = bytes as u64 > self.charge.limit() / 2 && bytes > self.live + self.live / 4;
        if bytes > WORTH && (bytes > 2 * self.live || crowded) {
            return self.compact(root);
        }
        Ok(root)
    }

    /// Compacts the arena in any case; see [`Arena::compact_if_worth`].
    pub fn compact(&mut self, root: Id) -> Result<Id, Full> {
        let ids = self.reachable(root);
        self.names.retain(|dirent| {
            if dirent.id == NONE || ids[dirent.dir as usize] == NONE {
                return false;
            }
            dirent.dir = ids[dirent.dir as usize];
            dirent.id = ids[dirent.id as usize];
            true
        });
        let mut used = vec![false; self.sets.len()];
        let mut at = 0;
        let (mut end, mut map_bytes) = (0, 0);
        let mut maps = Vec::new();
        // Link targets lie in the order of their inodes, so they only move towards the front.
        let Self {
            inodes,
            targets,
            maps: old_maps,
            ..
        } = self;
        inodes.retain_mut(|inode| {
            let keep = ids[at] != NONE;
            at += 1;
            if !keep {
                return false;
            }
            used[inode.xattrs.0 as usize] = true;
            match &mut inode.kind {
                ArenaKind::Directory { first, .. } => *first = NONE,
                ArenaKind::Symlink(TargetText { start, len }) => {
                    targets.copy_within(*start as usize..*start as usize + usize::from(*len), end);
                    *start = end as u32;
                    end += usize::from(*len);
                }
                ArenaKind::Sparse { map, .. } => {
                    let data = &mut old_maps[*map as usize];
                    let empty = crate::toc::FileData {
                        size: 0,
                        layout: crate::toc::DataLayout::Flat { device: 0 },
                    };
                    let data = std::mem::replace(data, empty);
                    map_bytes += Self::map_size(&data);
                    maps.push(data);
                    *map = (maps.len() - 1) as u32;
                }
                _ => {}
            }
            true
        });
        inodes.shrink_to_fit();
        targets.truncate(end);
        targets.shrink_to_fit();
        self.maps = maps;
        self.map_bytes = map_bytes;
        let sets = self.sets.retain(&used);
        for inode in &mut self.inodes {
            inode.xattrs = sets[inode.xattrs.0 as usize];
        }
        for number in 0..self.names.dirents.len() {
            let dir = self.names.dirents[number].dir;
            let next = std::mem::replace(self.first_mut(dir), number as u32);
            self.names.dirents[number].next = next;
        }
        self.live = self.bytes();
        self.charge.exactly(self.live as u64)?;
        Ok(ids[root as usize])
    }

    /// Returns the new number of every inode, or [`NONE`] for an inode that is not in the tree at `root`.
    fn reachable(&self, root: Id) -> Vec<Id> {
        let mut ids = vec![NONE; self.inodes.len()];
        ids[root as usize] = 0;
        let mut todo = vec![root];
        while let Some(dir) = todo.pop() {
            let mut next = self.first(dir);
            while next != NONE {
                let dirent = self.names.dirents[next as usize];
                next = dirent.next;
                if dirent.id != NONE && ids[dirent.id as usize] == NONE {
                    ids[dirent.id as usize] = 0;
                    todo.push(dirent.id);
                }
            }
        }
        let reached = ids.iter_mut().filter(|id| **id != NONE);
        for (number, id) in (0..).zip(reached) {
            *id = number;
        }
        ids
    }
}
