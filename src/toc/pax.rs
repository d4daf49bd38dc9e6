//! The records of a pax extended header (POSIX.1-2017, pax, "pax Extended Header"): `LEN SP KEY=VALUE LF`, where LEN
//! includes itself.
//!
//! A record with an empty value cancels the earlier records of its keyword: the header's own field counts again, and
//! an attribute is not set. Go's reader, which other engines use, drops such an attribute too. If a keyword occurs
//! twice, the last value counts. `GNU.sparse.offset` and `GNU.sparse.numbytes` are exceptions: their repetitions are the map of the oldest
//! pax sparse style.

use super::number::decimal;
use super::sparse::{SparsePiece, push_fragment};
use super::xattr::RawXattrs;

/// The values of the records; `None` for a keyword without a record.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub path: Option<Box<[u8]>>,
    pub link: Option<Box<[u8]>>,
    pub size: Option<u64>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    /// Seconds and nanoseconds.
    pub mtime: Option<(i64, u32)>,
    pub xattrs: RawXattrs,
    pub libarchive_xattrs: RawXattrs,
    pub sparse: SparseRecords,
}

/// The values of the `GNU.sparse.*` records.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    /// `GNU.sparse.major` and `.minor`.
    pub version: (Option<u64>, Option<u64>),
    /// The real name of the file, where `path` is a decoy.
    pub name: Option<Box<[u8]>>,
    /// Logical size in bytes (`GNU.sparse.size` or `.realsize`).
    pub size: Option<u64>,
    /// The map, in the styles that keep it in the header.
    pub map: Option<Vec<SparsePiece>>,
    /// A `GNU.sparse.offset` without its `GNU.sparse.numbytes` so far.
    offset: Option<u64>,
}

impl SparseRecords {
    /// Whether the map is at the start of the data (version 1.0).
    pub fn map_in_data(&self) -> bool {
        self.version == (Some(1), Some(0))
    }

    /// Returns the records if they make the entry a sparse file, else no records: then not even the name counts. The
    /// rule is the one of Go's reader, which other engines use.
    pub fn of_sparse_file(self) -> Self {
        let counts = match self.version {
            (Some(1), Some(0)) | (Some(0), Some(0 | 1)) => true,
            // The first versions do not state their version.
            (None, None) => self.map.is_some(),
            _ => false,
        };
        if counts { self } else { Self::default() }
    }
}

/// Why the records of a header cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PaxProblem {
    /// The header is not a sequence of records.
    Structure(&'static str),
    /// The value of a record does not parse.
    Value {
        /// The keyword.
        field: &'static str,
        /// The value.
        value: Vec<u8>,
    },
}

impl Pax {
    /// Parses the payload of an `x` header.
    pub fn parse(mut payload: &[u8]) -> Result<Self, PaxProblem> {
        let mut pax = Self::default();
        // Some writers count the padding as part of the size.
        while payload.iter().any(|&b| b != 0) {
            let (key, value, rest) = split_record(payload).map_err(PaxProblem::Structure)?;
            pax.record(key, value)?;
            payload = rest;
        }
        if pax.sparse.offset.is_some() {
            return Err(PaxProblem::Structure("GNU.sparse.offset without GNU.sparse.numbytes"));
        }
        Ok(pax)
    }

    fn clear(&mut self, key: &[u8]) {
        match key {
            b"path" => self.path = None,
            b"linkpath" => self.link = None,
            b"size" => self.size = None,
            b"uid" => self.uid = None,
            b"gid" => self.gid = None,
            b"mtime" => self.mtime = None,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.remove(name);
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    self.libarchive_xattrs.remove(name);
                }
            }
        }
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxProblem> {
        if value.is_empty() {
            // Cancels earlier records of the keyword, so that the header's own field counts again.
            self.clear(key);
            return Ok(());
        }
        // Use names of attributes as they are. GNU tar writes `=` as `%3D`, but the engines do not decode it.
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.insert(name.into(), value.into());
            return Ok(());
        }
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            self.libarchive_xattrs.insert(name.into(), value.into());
            return Ok(());
        }
        match key {
            b"path" => self.path = Some(value.into()),
            b"linkpath" => self.link = Some(value.into()),
            b"size" => self.size = Some(parse("pax size", value, decimal)?),
            b"uid" => self.uid = Some(parse("pax uid", value, signed_decimal)?),
            b"gid" => self.gid = Some(parse("pax gid", value, signed_decimal)?),
            b"mtime" => self.mtime = Some(parse("pax mtime", value, time)?),
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.record(key, value)?;
                }
            }
        }
        Ok(())
    }
}

impl SparseRecords {
    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxProblem> {
        match key {
            b"major" => self.version.0 = Some(parse("GNU.sparse.major", value, decimal)?),
            b"minor" => self.version.1 = Some(parse("GNU.sparse.minor", value, decimal)?),
            b"name" => self.name = Some(value.into()),
            b"size" => self.size = Some(parse("GNU.sparse.size", value, decimal)?),
            b"realsize" => self.size = Some(parse("GNU.sparse.realsize", value, decimal)?),
            b"map" => self.map = Some(parse("GNU.sparse.map", value, sparse_map)?),
            b"numblocks" => drop(self.map.get_or_insert_default()),
            b"offset" => {
                let offset = parse("GNU.sparse.offset", value, decimal)?;
                if self.offset.replace(offset).is_some() {
                    return Err(PaxProblem::Structure("GNU.sparse.offset without GNU.sparse.numbytes"));
                }
            }
            b"numbytes" => {
                let len = parse("GNU.sparse.numbytes", value, decimal)?;
                let Some(offset) = self.offset.take() else {
                    return Err(PaxProblem::Structure("GNU.sparse.numbytes without GNU.sparse.offset"));
                };
                push_fragment(self.map.get_or_insert_default(), SparsePiece { offset, len });
            }
            _ => {}
        }
        Ok(())
    }
}

type PaxRecord<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Splits the first record into keyword and value; also returns the bytes that follow the record.
fn split_record(bytes: &[u8]) -> Result<PaxRecord<'_>, &'static str> {
    // A length has at most 7 digits, because payloads are limited to 1 MiB.
    let space = bytes
        .iter()
        .take(8)
        .position(|&b| b == b' ')
        .ok_or("a record has no length")?;
    let len = decimal(&bytes[..space]).ok_or("the length of a record is no number")?;
    let len = usize::try_from(len)
        .ok()
        .filter(|&len| len <= bytes.len())
        .ok_or("a record is longer than the header")?;
    let (record, rest) = bytes.split_at(len);
    let record = record
        .get(space + 1..)
        .ok_or("a record is shorter than its length field")?;
    let record = record
        .strip_suffix(b"\n")
        .ok_or("a record does not end with a line feed")?;
    let equals = record
        .iter()
        .position(|&b| b == b'=')
        .ok_or("a record has no keyword")?;
    Ok((&record[..equals], &record[equals + 1..], rest))
}

fn parse<T>(field: &'static str, value: &[u8], with: impl FnOnce(&[u8]) -> Option<T>) -> Result<T, PaxProblem> {
    with(value).ok_or_else(|| PaxProblem::Value {
        field,
        value: value.to_vec(),
    })
}

/// Parses decimal digits behind an optional sign, as Go's reader does.
fn signed_decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Parses a time such as `-12.345678901` into seconds and nanoseconds. The nanoseconds of the result count upwards,
/// also from negative seconds. Digits after the ninth are cut off.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let mut parts = text.splitn(2, |&b| b == b'.');
    let whole = parts.next()?;
    let fraction = parts.next().unwrap_or_default();
    let seconds = signed_decimal(whole)?;
    let mut nanos = 0;
    for place in 0..fraction.len().max(9) {
        let digit = fraction.get(place).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return None;
        }
        if place < 9 {
            nanos = nanos * 10 + u32::from(digit - b'0');
        }
    }
    if whole.first() == Some(&b'-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

/// Parses a map of the form `offset,len,offset,len...`.
fn sparse_map(text: &[u8]) -> Option<Vec<SparsePiece>> {
    let mut map = Vec::new();
    let mut numbers = text.split(|&b| b == b',');
    while let Some(offset) = numbers.next() {
        let (offset, len) = (decimal(offset)?, decimal(numbers.next()?)?);
        push_fragment(&mut map, SparsePiece { offset, len });
    }
    Some(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(list: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (key, value) in list {
            let body = key.len() + value.len() + 3;
            let len = (1..)
                .map(|digits| body + digits)
                .find(|len| len.to_string().len() + body == *len)
                .unwrap();
            out.extend_from_slice(format!("{len} {key}=").as_bytes());
            out.extend_from_slice(value);
            out.push(b'\n');
        }
        out
    }

    #[test]
    fn records_are_read() {
        let pax = Pax::parse(&records(&[
            ("path", b"first"),
            ("path", b"with=equals\nand lines"),
            ("linkpath", b"cleared by the next"),
            ("linkpath", b""),
            ("size", b"123"),
            ("uid", b"4294967295"),
            ("gid", b"-2"),
            ("mtime", b"-1.5"),
            ("SCHILY.xattr.user.a", b"\0\n="),
            ("SCHILY.xattr.user.empty", b"cleared too"),
            ("SCHILY.xattr.user.empty", b""),
            ("LIBARCHIVE.xattr.user.b", b"AA"),
            ("comment", b"x"),
        ]))
        .unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"with=equals\nand lines"[..]));
        assert_eq!(
            (pax.link, pax.size, pax.uid, pax.gid),
            (None, Some(123), Some(4294967295), Some(-2))
        );
        assert_eq!(pax.mtime, Some((-2, 500_000_000)));
        assert_eq!(&*pax.xattrs[&b"user.a"[..]], b"\0\n=");
        assert!(!pax.xattrs.contains_key(&b"user.empty"[..]));
        assert_eq!(&*pax.libarchive_xattrs[&b"user.b"[..]], b"AA");
        assert!(pax.sparse.map.is_none());
    }

    #[test]
    fn damaged_records() {
        for bad in [
            "x",
            "12345678 a=b\n",
            "5 a=b\n",
            "6 a=b",
            "7 a=b\n",
            "4 a\n",
            "2 \n",
            "0 a=b\n",
            "99999999999999999999 ",
            "-6 a=b\n",
        ] {
            assert!(
                matches!(Pax::parse(bad.as_bytes()), Err(PaxProblem::Structure(_))),
                "{bad:?}"
            );
        }
        for (key, value) in [
            ("size", "-1"),
            ("size", "9223372036854775808"),
            ("uid", "x"),
            ("mtime", "1e9"),
            ("mtime", ".5"),
        ] {
            let parsed = Pax::parse(&records(&[(key, value.as_bytes())]));
            assert!(matches!(parsed, Err(PaxProblem::Value { .. })), "{key}={value}");
        }
        assert!(Pax::parse(b"6 a=b\n\0\0\0").is_ok());
        assert!(Pax::parse(b"").is_ok());
    }

    #[test]
    fn times() {
        for (text, value) in [
            ("0", (0, 0)),
            ("1700000000.5", (1_700_000_000, 500_000_000)),
            ("1.0000000019", (1, 1)),
            ("-0.25", (-1, 750_000_000)),
            ("-3", (-3, 0)),
            ("-3.0", (-3, 0)),
            ("7.", (7, 0)),
        ] {
            assert_eq!(time(text.as_bytes()), Some(value), "{text}");
        }
    }

    #[test]
    fn sparse_records() {
        let pairs = records(&[
            ("GNU.sparse.size", b"100"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"10"),
            ("GNU.sparse.numbytes", b"5"),
            ("GNU.sparse.offset", b"50"),
            ("GNU.sparse.numbytes", b"1"),
        ]);
        let expected = vec![SparsePiece { offset: 10, len: 5 }, SparsePiece { offset: 50, len: 1 }];
        assert_eq!(Pax::parse(&pairs).unwrap().sparse.map.as_ref(), Some(&expected));
        let list = records(&[("GNU.sparse.map", b"10,5,50,1"), ("GNU.sparse.name", b"n")]);
        assert_eq!(Pax::parse(&list).unwrap().sparse.map, Some(expected));
        for bad in ["1", "1,2,3", "1,,2", "1,2,"] {
            assert!(
                Pax::parse(&records(&[("GNU.sparse.map", bad.as_bytes())])).is_err(),
                "{bad}"
            );
        }
        assert!(Pax::parse(&records(&[("GNU.sparse.offset", b"1"), ("GNU.sparse.offset", b"1")])).is_err());
        assert!(Pax::parse(&records(&[("GNU.sparse.numbytes", b"1")])).is_err());
    }
}
