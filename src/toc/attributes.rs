//! Extended attributes that many files have in common, each kept once.

use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher as _;

/// Name and value of an extended attribute.
pub type Attribute = (Box<[u8]>, Box<[u8]>);

/// Number of an attribute among those of one [`Attributes`].
pub type AttributeId = u32;

/// What an attribute takes beside its bytes: two pointers with lengths, its place in the hash table, what an allocation costs.
const OVERHEAD: usize = 96;

/// Different attributes, numbered from 0 in the order in which they came.
#[derive(Debug, Default)]
pub struct Attributes {
    list: Vec<Attribute>,
    index: HashTable<AttributeId>,
    hasher: DefaultHashBuilder,
    bytes: usize,
}

impl Attributes {
    /// The number of an attribute, and whether it is a new one.
    pub fn intern(&mut self, name: &[u8], value: &[u8]) -> (AttributeId, bool) {
        let hash = self.hasher.hash_one((name, value));
        let list = &self.list;
        let same = |id: &AttributeId| {
            let (other_name, other_value) = &list[*id as usize];
            &**other_name == name && &**other_value == value
        };
        if let Some(id) = self.index.find(hash, same) {
            return (*id, false);
        }
        // Each takes memory, so there are fewer than 32 bits number.
        let id = self.list.len() as AttributeId;
        self.list.push((name.into(), value.into()));
        self.index(id);
        (id, true)
    }

    fn index(&mut self, id: AttributeId) {
        let (list, hasher) = (&self.list, &self.hasher);
        let hash = |id: &AttributeId| {
            let (name, value) = &list[*id as usize];
            hasher.hash_one((&**name, &**value))
        };
        self.index.insert_unique(hash(&id), id, hash);
        let (name, value) = &self.list[id as usize];
        self.bytes += name.len() + value.len() + OVERHEAD;
    }

    /// Keeps only those that `used` says, which has a value for each; the new numbers.
    pub fn retain(&mut self, used: &[bool]) -> Vec<AttributeId> {
        let mut numbers = Vec::with_capacity(used.len());
        let mut next = 0;
        for used in used {
            numbers.push(next);
            next += AttributeId::from(*used);
        }
        let mut used = used.iter();
        self.list.retain(|_| used.next().copied().unwrap_or(false));
        self.index.clear();
        self.bytes = 0;
        for id in 0..self.list.len() as AttributeId {
            self.index(id);
        }
        numbers
    }

    /// Name and value.
    ///
    /// # Panics
    /// If no attribute has this number.
    pub fn get(&self, id: AttributeId) -> (&[u8], &[u8]) {
        let (name, value) = &self.list[id as usize];
        (name, value)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Memory they take, roughly.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
