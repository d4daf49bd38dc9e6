//! The JSON of a table, read entry by entry.
//!
//! All dialects have the same form: `{"version": 1, "entries": [...]}`. The reader never has more than one entry in
//! memory. One entry may have at most [`MAX_ENTRY`] bytes of JSON, so a hostile table cannot make one string take all
//! memory.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::CarriedError;

/// Most bytes of JSON of one entry. A name has at most 4096 bytes and attributes at most 256 KiB, which take half as
/// much again as base64.
const MAX_ENTRY: usize = 1 << 20;
/// Bytes that are read at once.
const BUFFER: usize = 32 << 10;
/// The only version of tables there is.
const VERSION: u64 = 1;

/// One entry of a table, as the JSON has it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct JsonEntry {
    #[serde(rename = "type")]
    pub kind: String,
    pub name: Option<String>,
    pub size: i64,
    pub modtime: Option<String>,
    pub link_name: Option<String>,
    pub mode: i64,
    pub uid: i64,
    pub gid: i64,
    pub dev_major: i64,
    pub dev_minor: i64,
    pub xattrs: Option<BTreeMap<String, String>>,
    pub digest: Option<String>,
    pub offset: i64,
    pub end_offset: i64,
    pub inner_offset: i64,
    pub chunk_offset: i64,
    pub chunk_size: i64,
    pub chunk_digest: Option<String>,
    pub chunk_type: Option<String>,
}

/// Reads a table. Gives each entry to `entry`.
pub(super) fn read(
    json: impl Read,
    mut entry: impl FnMut(JsonEntry) -> Result<(), CarriedError>,
) -> Result<(), CarriedError> {
    let left = Cell::new(MAX_ENTRY);
    // The error of `entry` does not fit into an error of the JSON reader.
    let refused = RefCell::new(None);
    let metered = Metered {
        inner: json,
        left: &left,
        buffer: vec![0; BUFFER].into(),
        filled: 0..0,
    };
    let mut reader = serde_json::Deserializer::from_reader(metered);
    let document = JsonTable {
        entry: &mut entry,
        left: &left,
        refused: &refused,
    };
    let read = document.deserialize(&mut reader).and_then(|()| reader.end());
    match (refused.into_inner(), read) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => Err(CarriedError::Malformed {
            reason: error.to_string(),
        }),
    }
}

/// A reader that stops if one entry takes too many bytes.
struct Metered<'a, R> {
    inner: R,
    left: &'a Cell<usize>,
    buffer: Box<[u8]>,
    filled: std::ops::Range<usize>,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.filled.is_empty() {
            self.filled = 0..self.inner.read(&mut self.buffer)?;
        }
        let left = self.left.get();
        if left == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an entry is too long"));
        }
        let len = self.filled.len().min(out.len()).min(left);
        out[..len].copy_from_slice(&self.buffer[self.filled.start..][..len]);
        self.filled.start += len;
        self.left.set(left - len);
        Ok(len)
    }
}

/// The whole table.
struct JsonTable<'a, F> {
    entry: &'a mut F,
    left: &'a Cell<usize>,
    refused: &'a RefCell<Option<CarriedError>>,
}

impl<'de, F: FnMut(JsonEntry) -> Result<(), CarriedError>> DeserializeSeed<'de> for JsonTable<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, F: FnMut(JsonEntry) -> Result<(), CarriedError>> Visitor<'de> for JsonTable<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut version, mut has_entries) = (None, false);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "version" => version = Some(map.next_value::<u64>()?),
                "entries" if has_entries => return Err(A::Error::duplicate_field("entries")),
                "entries" => {
                    has_entries = true;
                    map.next_value_seed(JsonEntries {
                        entry: &mut *self.entry,
                        left: self.left,
                        refused: self.refused,
                    })?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        match (version, has_entries) {
            (Some(VERSION), true) => Ok(()),
            (Some(VERSION), false) => Err(A::Error::missing_field("entries")),
            _ => Err(A::Error::custom("the version is not 1")),
        }
    }
}

/// The list of entries.
struct JsonEntries<'a, F> {
    entry: &'a mut F,
    left: &'a Cell<usize>,
    refused: &'a RefCell<Option<CarriedError>>,
}

impl<'de, F: FnMut(JsonEntry) -> Result<(), CarriedError>> DeserializeSeed<'de> for JsonEntries<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(JsonEntry) -> Result<(), CarriedError>> Visitor<'de> for JsonEntries<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        self.left.set(MAX_ENTRY);
        while let Some(entry) = list.next_element::<JsonEntry>()? {
            self.left.set(MAX_ENTRY);
            if let Err(error) = (self.entry)(entry) {
                self.refused.replace(Some(error));
                return Err(A::Error::custom("an entry was refused"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(json: &str) -> Result<Vec<String>, CarriedError> {
        let mut names = Vec::new();
        read(json.as_bytes(), |entry| {
            names.push(entry.name.unwrap_or_default());
            Ok(())
        })?;
        Ok(names)
    }

    #[test]
    fn entries_come_one_by_one() {
        let json = r#" { "tarSplitDigest": {"a": [1, null]}, "entries" : [
            {"name": "a", "type": "reg", "xattrs": null, "unknown": [[]]}, {"type": "dir", "name": "\u00e4"}, {}
        ], "version": 1 } "#;
        assert_eq!(names(json).unwrap(), ["a", "ä", ""]);
    }

    #[test]
    fn other_documents_are_refused() {
        for json in [
            "",
            "[]",
            "{}",
            "null",
            r#"{"version":1}"#,
            r#"{"entries":[]}"#,
            r#"{"version":2,"entries":[]}"#,
            r#"{"version":1,"entries":[]} x"#,
            r#"{"version":1,"entries":[],"entries":[]}"#,
            r#"{"version":1,"entries":[{"name":"a","name":"b"}]}"#,
            r#"{"version":1,"entries":[{"size":1e3}]}"#,
            r#"{"version":1,"entries":[{"name":"\ud800"}]}"#,
            r#"{"version":1,"entries":[{"name":"a"}"#,
            r#"{"version":1,"entries":[{"size":99999999999999999999}]}"#,
        ] {
            assert!(matches!(names(json), Err(CarriedError::Malformed { .. })), "{json}");
        }
        let deep = format!(r#"{{"version":1,"entries":[{{"x":{}"#, "[".repeat(100_000));
        assert!(names(&deep).is_err());
    }

    #[test]
    fn a_long_entry_is_not_collected() {
        let long = |len: usize| format!(r#"{{"version":1,"entries":[{{}},{{"name":"{}"}}]}}"#, "a".repeat(len));
        assert!(names(&long(MAX_ENTRY - 100)).is_ok());
        assert!(names(&long(MAX_ENTRY)).unwrap_err().to_string().contains("too long"));
        // Many short entries may be longer together.
        let many = vec![format!(r#"{{"name":"{}"}}"#, "a".repeat(MAX_ENTRY / 2)); 5].join(",");
        assert_eq!(
            names(&format!(r#"{{"version":1,"entries":[{many}]}}"#)).unwrap().len(),
            5
        );
    }

    #[test]
    fn the_error_of_an_entry_is_returned() {
        let refusal = CarriedError::Unusable { reason: "no" };
        let refuse = |_| Err(refusal.clone());
        let read = read(r#"{"entries":[{}],"version":1}"#.as_bytes(), refuse);
        assert_eq!(read, Err(refusal));
    }
}
