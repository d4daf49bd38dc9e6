//! Extended attributes of many files, each different attribute stored once.

use std::hash::BuildHasher as _;

use hashbrown::{DefaultHashBuilder, HashTable};

/// Name and value of an extended attribute.
pub type Attribute = (Box<[u8]>, Box<[u8]>);

/// Number of an attribute within one [`Attributes`].
pub type AttributeId = u32;

/// Memory in bytes that an attribute takes in addition to its own bytes: its [`AttributePlace`] and its entry in the hash
/// table.
const OVERHEAD: usize = size_of::<AttributePlace>() + 16;

/// Different attributes, numbered from 0 in the order in which they were added. All names and values lie back to back
/// in one buffer, so the allocator returns the memory to the system when the value is dropped.
#[derive(Debug, Default)]
pub struct Attributes {
    text: Vec<u8>,
    places: Vec<AttributePlace>,
    index: HashTable<AttributeId>,
    hasher: DefaultHashBuilder,
}

#[derive(Debug, Clone, Copy)]
struct AttributePlace {
    start: usize,
    name_len: u32,
    value_len: u32,
}

impl AttributePlace {
    fn len(&self) -> usize {
        self.name_len as usize + self.value_len as usize
    }

    fn of<'a>(&self, text: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        text[self.start..][..self.len()].split_at(self.name_len as usize)
    }
}

impl Attributes {
    /// Returns the number of an attribute, and whether it is new.
    pub(crate) fn intern(&mut self, name: &[u8], value: &[u8]) -> (AttributeId, bool) {
        let hash = self.hasher.hash_one((name, value));
        let same = |id: &AttributeId| self.get(*id) == (name, value);
        if let Some(id) = self.index.find(hash, same) {
            return (*id, false);
        }
        // Every attribute takes memory, so there are fewer than 2^32. Names and values from a tar are shorter than
        // 2^32 bytes.
        let id = self.places.len() as AttributeId;
        self.places.push(AttributePlace {
            start: self.text.len(),
            name_len: name.len() as u32,
            value_len: value.len() as u32,
        });
        self.text.extend_from_slice(name);
        self.text.extend_from_slice(value);
        self.index(id);
        (id, true)
    }

    fn index(&mut self, id: AttributeId) {
        let (text, places, hasher) = (&self.text, &self.places, &self.hasher);
        let hash = |id: &AttributeId| hasher.hash_one(places[*id as usize].of(text));
        self.index.insert_unique(hash(&id), id, hash);
    }

    /// Keeps only the attributes that `used` marks; `used` has one value for each attribute. Returns the new number
    /// of each kept attribute, by its old number.
    pub fn retain(&mut self, used: &[bool]) -> Vec<AttributeId> {
        let mut numbers = Vec::with_capacity(used.len());
        let mut next = 0;
        for used in used {
            numbers.push(next);
            next += AttributeId::from(*used);
        }
        let Self { text, places, .. } = self;
        let mut used = used.iter();
        let mut end = 0;
        // The bytes lie in the order of the numbers, so they only move towards the front.
        places.retain_mut(|place| {
            if !used.next().copied().unwrap_or(false) {
                return false;
            }
            text.copy_within(place.start..place.start + place.len(), end);
            place.start = end;
            end += place.len();
            true
        });
        text.truncate(end);
        text.shrink_to_fit();
        self.index.clear();
        for id in 0..self.places.len() as AttributeId {
            self.index(id);
        }
        numbers
    }

    /// Returns name and value of an attribute.
    ///
    /// # Panics
    /// If no attribute has this number.
    pub fn get(&self, id: AttributeId) -> (&[u8], &[u8]) {
        self.places[id as usize].of(&self.text)
    }

    /// Returns the number of attributes.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are no attributes.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Returns roughly how many bytes of memory the attributes take.
    pub fn bytes(&self) -> usize {
        self.text.len() + self.places.len() * OVERHEAD
    }
}
