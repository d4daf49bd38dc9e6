//! The JSON of a table, read entry by entry.
//!
//! All dialects have the same form: `{"version": 1, "entries": [...]}`. The reader never has more than one entry in
//! memory. One entry may have at most [`MAX_ENTRY`] bytes of JSON, so a hostile table cannot make one string take all
//! memory.

use std::collections::BTreeMap;
use std::io::{self, Read};

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

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
    let mut values = ValueReader::new(json);
    let (mut version, mut has_entries) = (None, false);
    values.expect(b'{')?;
    let mut more = !values.skip(b'}')?;
    while more {
        let key: String = values.parse()?;
        values.expect(b':')?;
        match key.as_str() {
            "version" => version = Some(values.parse::<u64>()?),
            "entries" if has_entries => return Err(malformed("it has two lists of entries")),
            "entries" => {
                has_entries = true;
                values.list(&mut entry)?;
            }
            _ => {
                values.parse::<IgnoredAny>()?;
            }
        }
        more = values.goes_on(b'}')?;
    }
    if values.peek()?.is_some() {
        return Err(malformed("bytes follow it"));
    }
    match (version, has_entries) {
        (Some(VERSION), true) => Ok(()),
        (Some(VERSION), false) => Err(malformed("it has no entries")),
        _ => Err(malformed("the version is not 1")),
    }
}

fn malformed(reason: impl ToString) -> CarriedError {
    CarriedError::Malformed {
        reason: reason.to_string(),
    }
}

/// Cuts JSON into values, so that serde_json parses each of them from a slice. That takes half as much time as parsing
/// from a reader. Whether a value is valid is for serde_json to say: the cut only finds its end.
struct ValueReader<R> {
    inner: R,
    buffer: Vec<u8>,
    /// Where the next byte lies in `buffer`.
    at: usize,
}

impl<R: Read> ValueReader<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            buffer: Vec::new(),
            at: 0,
        }
    }

    /// Reads some more bytes behind those in the buffer. Returns false at the end.
    fn fill(&mut self) -> Result<bool, CarriedError> {
        self.buffer.drain(..self.at);
        self.at = 0;
        let filled = self.buffer.len();
        self.buffer.resize(filled + BUFFER, 0);
        let read = loop {
            match self.inner.read(&mut self.buffer[filled..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        self.buffer.truncate(filled + read.as_ref().map_or(0, |&len| len));
        Ok(read.map_err(malformed)? > 0)
    }

    /// Returns the next byte that is not white space, and stays before it. `None` at the end.
    fn peek(&mut self) -> Result<Option<u8>, CarriedError> {
        loop {
            let rest = &self.buffer[self.at..];
            let blank = rest.iter().take_while(|byte| b" \t\r\n".contains(byte)).count();
            self.at += blank;
            if let Some(&byte) = self.buffer.get(self.at) {
                return Ok(Some(byte));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Passes over `byte` if it comes next.
    fn skip(&mut self, byte: u8) -> Result<bool, CarriedError> {
        let found = self.peek()? == Some(byte);
        self.at += usize::from(found);
        Ok(found)
    }

    fn expect(&mut self, byte: u8) -> Result<(), CarriedError> {
        match self.skip(byte)? {
            true => Ok(()),
            false => Err(malformed(format!(
                "there is no {:?} where it has to be",
                char::from(byte)
            ))),
        }
    }

    /// Whether another element of an object or a list comes, which ends with `close`.
    fn goes_on(&mut self, close: u8) -> Result<bool, CarriedError> {
        let comma = self.skip(b',')?;
        if !comma {
            self.expect(close)?;
        }
        Ok(comma)
    }

    fn list(&mut self, entry: &mut impl FnMut(JsonEntry) -> Result<(), CarriedError>) -> Result<(), CarriedError> {
        self.expect(b'[')?;
        let mut more = !self.skip(b']')?;
        while more {
            entry(self.parse()?)?;
            more = self.goes_on(b']')?;
        }
        Ok(())
    }

    /// Parses the next value.
    fn parse<T: DeserializeOwned>(&mut self) -> Result<T, CarriedError> {
        self.peek()?;
        let mut end = ValueEnd::default();
        let mut seen = 0;
        let len = loop {
            if let Some(len) = end.find(&self.buffer[self.at + seen..]) {
                break seen + len;
            }
            seen = self.buffer.len() - self.at;
            if seen > MAX_ENTRY {
                return Err(malformed("an entry is too long"));
            }
            // serde_json says what is missing.
            if !self.fill()? {
                break seen;
            }
        };
        if len > MAX_ENTRY {
            return Err(malformed("an entry is too long"));
        }
        let value = serde_json::from_slice(&self.buffer[self.at..self.at + len]).map_err(malformed);
        self.at += len;
        value
    }
}

/// Looks for the end of a value.
#[derive(Debug, Default)]
struct ValueEnd {
    /// Objects and lists that are open.
    depth: usize,
    in_string: bool,
    /// Whether the next byte belongs to an escape.
    escaped: bool,
    /// Whether a number or a word began.
    in_word: bool,
}

impl ValueEnd {
    /// Goes on with `bytes`. Returns how many of them belong to the value, if its end is among them.
    fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.in_string {
                if self.escaped {
                    self.escaped = false;
                } else {
                    let rest = &bytes[at..];
                    let special = rest.iter().position(|byte| matches!(byte, b'"' | b'\\'));
                    at += special.unwrap_or(rest.len());
                    match bytes.get(at) {
                        Some(b'"') => {
                            self.in_string = false;
                            if self.depth == 0 {
                                return Some(at + 1);
                            }
                        }
                        Some(_) => self.escaped = true,
                        None => return None,
                    }
                }
            } else {
                match byte {
                    b',' | b':' | b'}' | b']' | b' ' | b'\t' | b'\r' | b'\n' if self.in_word && self.depth == 0 => {
                        return Some(at);
                    }
                    b'"' => self.in_string = true,
                    b'{' | b'[' => self.depth += 1,
                    b'}' | b']' => {
                        self.depth = self.depth.saturating_sub(1);
                        if self.depth == 0 {
                            return Some(at + 1);
                        }
                    }
                    _ => self.in_word = self.depth == 0,
                }
            }
            at += 1;
        }
        None
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

    /// Returns single bytes.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.0.by_ref().take(1).read(out)
        }
    }

    #[test]
    fn pieces_of_any_size_give_the_same() {
        let json = r#"{"x\"y":"\\","a":-1.5e3 ,"b":[{}, "]"],"entries":[ {"name":"\\\"}]","xattrs":{"a":"{["}} ,{"name":"b"}],
            "c":null,"version":1 }"#;
        let mut slow = Vec::new();
        let read = read(Slow(json.as_bytes()), |entry| {
            slow.push(entry.name.unwrap_or_default());
            Ok(())
        });
        assert_eq!((read, slow), (Ok(()), names(json).unwrap()));
        assert_eq!(names(json).unwrap(), ["\\\"}]", "b"]);
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
            r#"{"version":1,"entries":[{"name":"a"}]"#,
            r#"{"version":1,"entries":[{"name":"a"},]}"#,
            r#"{"version":1,"entries":[{"name":"a"} {"name":"b"}]}"#,
            r#"{"version":1,"entries":[{"name":"a"}],}"#,
            r#"{"version":1,"entries":[{"name":"a"]}}"#,
            r#"{"version":1,"entries":[}]}"#,
            r#"{"version":1 "entries":[]}"#,
            r#"{"version","entries":[]}"#,
            r#"{version:1,"entries":[]}"#,
            r#"{"version":1,"entries":[],"x":tru}"#,
            r#"{"version":1,"entries":[],"x":}"#,
            r#"{"version":1,"entries":[],"x":"\"}"#,
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
