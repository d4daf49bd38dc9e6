//! Sets of extended attributes. Each attribute and each set is stored once, however many inodes have it.

use std::hash::BuildHasher as _;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::Full;
use crate::memory::OverLimit;
use crate::toc::{AttributeId, Attributes};

/// Number of a set within its [`Sets`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::tree) struct SetId(pub u32);

impl SetId {
    /// The empty set.
    pub const EMPTY: Self = Self(0);
}

/// Memory in bytes that a set takes in addition to its list.
const OVERHEAD: usize = 48;

/// All sets of an arena.
#[derive(Debug)]
pub(in crate::tree) struct Sets {
    pub attributes: Attributes,
    /// Attributes of each set. The first set is empty.
    list: Vec<Box<[AttributeId]>>,
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    list_bytes: usize,
}

impl Default for Sets {
    fn default() -> Self {
        Self {
            attributes: Attributes::default(),
            list: vec![Box::default()],
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            list_bytes: 0,
        }
    }
}

impl Sets {
    pub fn bytes(&self) -> usize {
        self.attributes.bytes() + self.list_bytes
    }

    pub fn get(&self, set: SetId) -> &[AttributeId] {
        &self.list[set.0 as usize]
    }

    /// Returns the set of these attributes, which are sorted by name. Adds the set if it is new.
    pub fn intern(&mut self, attributes: &[AttributeId]) -> Result<SetId, Full> {
        if attributes.is_empty() {
            return Ok(SetId::EMPTY);
        }
        let hash = self.hasher.hash_one(attributes);
        let list = &self.list;
        if let Some(set) = self.index.find(hash, |set| *list[*set as usize] == *attributes) {
            return Ok(SetId(*set));
        }
        let Ok(set) = u32::try_from(self.list.len()) else {
            return Err(OverLimit { limit: u32::MAX.into() }.into());
        };
        self.list.push(attributes.into());
        self.index(set);
        Ok(SetId(set))
    }

    fn index(&mut self, set: u32) {
        let (list, hasher) = (&self.list, &self.hasher);
        let hash = |set: &u32| hasher.hash_one(&*list[*set as usize]);
        self.index.insert_unique(hash(&set), set, hash);
        self.list_bytes += size_of_val(&*self.list[set as usize]) + OVERHEAD;
    }

    /// Keeps only the sets that `used` marks; `used` has one value for each set. Returns the new number of each kept
    /// set, by its old number.
    pub fn retain(&mut self, used: &[bool]) -> Vec<SetId> {
        let mut used_attributes = vec![false; self.attributes.len()];
        let mut numbers = vec![SetId::EMPTY; self.list.len()];
        let kept = self.list.iter().enumerate().skip(1).filter(|(number, _)| used[*number]);
        for (next, (number, set)) in (1..).zip(kept) {
            numbers[number] = SetId(next);
            set.iter().for_each(|id| used_attributes[*id as usize] = true);
        }
        let attributes = self.attributes.retain(&used_attributes);
        let mut at = 0..self.list.len();
        self.list.retain(|_| at.next().is_some_and(|at| at == 0 || used[at]));
        self.index.clear();
        self.list_bytes = 0;
        for set in 1..self.list.len() as u32 {
            self.list[set as usize]
                .iter_mut()
                .for_each(|id| *id = attributes[*id as usize]);
            self.index(set);
        }
        numbers
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }
}
