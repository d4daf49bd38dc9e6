//! Names in directories: a record for each name, one buffer with the bytes of all names, and a hash table by
//! directory and name.

use std::hash::BuildHasher as _;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::{Arena, ArenaKind, Full, Id, NONE};
use crate::memory::OverLimit;

/// One name of an inode.
#[derive(Debug, Clone, Copy)]
pub(in crate::tree) struct ArenaDirent {
    /// The directory that the name is in.
    pub dir: Id,
    /// The inode, or [`NONE`] once the name is removed.
    pub id: Id,
    /// Number of the directory's next name.
    pub next: u32,
    start: u32,
    len: u8,
}

/// Memory in bytes that a name takes: its record, its place in the hash table, and its place in the finished tree.
const DIRENT_BYTES: usize = size_of::<ArenaDirent>() + 14;

/// All names of an [`Arena`].
#[derive(Debug, Default)]
pub(in crate::tree) struct Names {
    pub dirents: Vec<ArenaDirent>,
    pub text: Vec<u8>,
    /// Numbers of the dirents that are not removed.
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Names {
    pub fn bytes(&self) -> usize {
        self.dirents.len() * DIRENT_BYTES + self.text.len()
    }

    pub fn name(&self, dirent: &ArenaDirent) -> &[u8] {
        &self.text[dirent.start as usize..][..dirent.len.into()]
    }

    /// Returns the number of the dirent of `name` in `dir`.
    pub fn find(&self, dir: Id, name: &[u8]) -> Option<u32> {
        let same = |number: &u32| {
            let dirent = &self.dirents[*number as usize];
            dirent.dir == dir && self.name(dirent) == name
        };
        self.index.find(self.hasher.hash_one((dir, name)), same).copied()
    }

    fn index(&mut self, number: u32) {
        let (dirents, text, hasher) = (&self.dirents, &self.text, &self.hasher);
        let hash = |number: &u32| {
            let dirent = &dirents[*number as usize];
            let name = &text[dirent.start as usize..][..dirent.len.into()];
            hasher.hash_one((dirent.dir, name))
        };
        self.index.insert_unique(hash(&number), number, hash);
    }

    fn unindex(&mut self, number: u32) {
        let dirent = &self.dirents[number as usize];
        let hash = self.hasher.hash_one((dirent.dir, self.name(dirent)));
        if let Ok(entry) = self.index.find_entry(hash, |other| *other == number) {
            entry.remove();
        }
    }

    /// Removes the name with this number, which must not be removed yet, from its directory.
    pub fn remove(&mut self, number: u32) {
        self.unindex(number);
        self.dirents[number as usize].id = NONE;
    }

    /// Keeps only the names for which `keep` returns true, in their order. `keep` may change the dirents that it
    /// keeps.
    pub fn retain(&mut self, mut keep: impl FnMut(&mut ArenaDirent) -> bool) {
        let Self { dirents, text, .. } = self;
        let mut end = 0;
        // The bytes of names lie in the order of dirents, so they only move towards the front.
        dirents.retain_mut(|dirent| {
            if !keep(dirent) {
                return false;
            }
            let (from, len) = (dirent.start as usize, usize::from(dirent.len));
            text.copy_within(from..from + len, end);
            dirent.start = end as u32;
            end += len;
            true
        });
        text.truncate(end);
        text.shrink_to_fit();
        dirents.shrink_to_fit();
        self.index = HashTable::with_capacity(self.dirents.len());
        for number in 0..self.dirents.len() as u32 {
            self.index(number);
        }
    }

    /// Adds a name without checking for an existing one. Returns its number.
    pub fn append(&mut self, dir: Id, name: &[u8], id: Id) -> u32 {
        let number = self.dirents.len() as u32;
        self.dirents.push(ArenaDirent {
            dir,
            id,
            next: NONE,
            start: self.text.len() as u32,
            len: u8::try_from(name.len()).expect("names have at most 255 bytes"),
        });
        self.text.extend_from_slice(name);
        number
    }

    /// Frees the hash table. No name can be looked up afterwards.
    pub fn close(&mut self) {
        self.index = HashTable::new();
    }
}

impl Arena {
    pub fn child(&self, dir: Id, name: &[u8]) -> Option<Id> {
        self.names
            .find(dir, name)
            .map(|number| self.names.dirents[number as usize].id)
    }

    pub fn first_mut(&mut self, dir: Id) -> &mut u32 {
        match &mut self.get_mut(dir).kind {
            ArenaKind::Directory { first, .. } => first,
            _ => unreachable!("only directories have names"),
        }
    }

    /// Returns the number of a directory's first name, or [`NONE`].
    pub fn first(&self, dir: Id) -> u32 {
        match self.get(dir).kind {
            ArenaKind::Directory { first, .. } => first,
            _ => NONE,
        }
    }

    /// Binds `name` in the directory `dir` to `id`. Returns the number of the name, and the inode that had the name
    /// before.
    pub fn bind(&mut self, dir: Id, name: &[u8], id: Id) -> Result<(u32, Option<Id>), Full> {
        if let Some(number) = self.names.find(dir, name) {
            let old = std::mem::replace(&mut self.names.dirents[number as usize].id, id);
            return Ok((number, Some(old)));
        }
        let number = self.names.dirents.len() as u32;
        if self.names.text.len() + name.len() > u32::MAX as usize || number == NONE {
            return Err(OverLimit { limit: u32::MAX.into() }.into());
        }
        self.names.append(dir, name, id);
        self.names.dirents[number as usize].next = std::mem::replace(self.first_mut(dir), number);
        self.names.index(number);
        self.cover(0)?;
        Ok((number, None))
    }

    /// Removes a name from a directory, if it exists.
    pub fn unbind(&mut self, dir: Id, name: &[u8]) {
        if let Some(number) = self.names.find(dir, name) {
            self.names.remove(number);
        }
    }

    /// Removes all names from a directory.
    pub fn clear(&mut self, dir: Id) {
        let mut next = std::mem::replace(self.first_mut(dir), NONE);
        while next != NONE {
            let number = next;
            let dirent = self.names.dirents[number as usize];
            next = dirent.next;
            if dirent.id != NONE {
                self.names.unindex(number);
                self.names.dirents[number as usize].id = NONE;
            }
        }
    }

    /// Moves a name to the directory `dir`, which must not have the name yet. The name list of its old directory is
    /// invalid afterwards.
    pub fn move_name(&mut self, number: u32, dir: Id) {
        self.names.unindex(number);
        let next = std::mem::replace(self.first_mut(dir), number);
        let dirent = &mut self.names.dirents[number as usize];
        dirent.dir = dir;
        dirent.next = next;
        self.names.index(number);
    }
}
