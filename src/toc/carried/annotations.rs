//! What a layer's descriptor says of the table that the layer carries.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{CarriedError, Footer};
use crate::oci::{Descriptor, Digest};
use crate::toc::ChunkCodec;

/// Digest of the JSON, of eStargz and of stargz-snapshotter's zstd:chunked.
const STARGZ_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Digest and place of the compressed JSON, of containers/storage.
const CONTAINERS: [&str; 2] = [
    "io.github.containers.zstd-chunked.manifest-checksum",
    "io.github.containers.zstd-chunked.manifest-position",
];
/// The same keys of old versions of containers/storage, and of stargz-snapshotter.
const CONTAINERS_OLD: [&str; 2] = [
    "io.containers.zstd-chunked.manifest-checksum",
    "io.containers.zstd-chunked.manifest-position",
];

/// Largest table in bytes, compressed and as JSON. The largest layers known have tables of a few megabytes, and
/// containers/storage reads tables of up to 150 MB. A larger limit takes more memory and more time on tables of
/// hostile images.
pub(super) const MAX_PACKED: u64 = 64 << 20;
pub(super) const MAX_JSON: u64 = 256 << 20;

/// Bytes of the blob's end that are fetched first if no annotation says where the table is: this part of the blob,
/// within these bounds. A table has mostly 1 to 2 % of its blob. A smaller guess needs a second request more often; a
/// larger one fetches more bytes that are not needed.
const GUESS: u64 = 64;
const LEAST_GUESS: u64 = 64 << 10;
const MOST_GUESS: u64 = 4 << 20;

/// Bytes of the header before the data of a skippable zstd frame, which holds a table.
const SKIPPABLE_HEADER: u64 = 8;

/// How a table lists the chunks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// A chunk ends where the next one begins, of whatever file.
    Stargz,
    /// A chunk ends where the file's next one begins, and each file has an end.
    Containers,
}

/// A table that a layer carries and for which the layer's descriptor vouches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableRef {
    pub(super) codec: ChunkCodec,
    pub(super) dialect: Dialect,
    /// The table's bytes in the blob. None if only the blob's footer says where they are.
    pub(super) place: Option<Range<u64>>,
    /// Digest of the JSON in the dialect of stargz, of the compressed table in that of containers.
    pub(super) digest: Digest,
    /// Digest of the compressed table, if the descriptor has it besides that of the JSON.
    pub(super) packed: Option<Digest>,
    pub(super) blob_size: u64,
}

impl TableRef {
    /// Returns the table for which a layer's descriptor vouches. Returns none if the descriptor names no table.
    pub fn of(descriptor: &Descriptor) -> Result<Option<Self>, CarriedError> {
        let blob_size = u64::try_from(descriptor.size).unwrap_or(0);
        Self::in_annotations(&descriptor.annotations, blob_size)
    }

    /// Returns the table that the annotations of a blob of `blob_size` bytes name.
    pub fn in_annotations(
        annotations: &BTreeMap<String, String>,
        blob_size: u64,
    ) -> Result<Option<Self>, CarriedError> {
        let get = |key: &str| annotations.get(key).map(|value| value.trim());
        let stargz = get(STARGZ_DIGEST).map(digest).transpose()?;
        let of_containers = |keys: [&str; 2]| match keys.map(get) {
            [Some(checksum), Some(place)] => Ok(Some((digest(checksum)?, position(place, blob_size)?))),
            [None, None] => Ok(None),
            _ => Err(unusable("the descriptor names its digest or its place, and not both")),
        };
        let (new, old) = (of_containers(CONTAINERS)?, of_containers(CONTAINERS_OLD)?);
        let zstd = |dialect, digest, packed, place| Self {
            codec: ChunkCodec::Zstd,
            dialect,
            place: Some(place),
            digest,
            packed,
            blob_size,
        };
        Ok(Some(match (new, old, stargz) {
            (Some(_), _, Some(_)) => return Err(unusable("the descriptor names two tables")),
            (Some((packed, place)), _, None) | (None, Some((packed, place)), None) => {
                zstd(Dialect::Containers, packed, None, place)
            }
            (None, Some((packed, place)), Some(json)) => zstd(Dialect::Stargz, json, Some(packed), place),
            (None, None, Some(_)) if blob_size <= Footer::SIZE => {
                return Err(unusable("the blob is too small for one"));
            }
            (None, None, Some(digest)) => Self {
                codec: ChunkCodec::Gzip,
                dialect: Dialect::Stargz,
                place: None,
                digest,
                packed: None,
                blob_size,
            },
            (None, None, None) => return Ok(None),
        }))
    }

    /// Whether the annotations of a layer say that its writer adds files to the root ([`super::ADDED`]).
    pub fn adds_files(descriptor: &Descriptor) -> bool {
        descriptor.annotations.contains_key(STARGZ_DIGEST)
    }

    /// Returns the digest by which the descriptor names the table.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Returns how the layer's members are compressed.
    pub fn codec(&self) -> ChunkCodec {
        self.codec
    }

    /// Returns a hash of everything that vouches for the table and says where it is. Two layers with the same blob and
    /// the same source have the same table.
    pub fn source(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let place = self.place.clone().unwrap_or_default();
        for number in [self.codec as u64, self.dialect as u64, place.start, place.end] {
            hasher.update(&number.to_le_bytes());
        }
        for digest in [Some(&self.digest), self.packed.as_ref()] {
            let text = digest.map(Digest::to_string).unwrap_or_default();
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// Returns the bytes of the blob to fetch first: the table, or the end of the blob.
    pub fn first_range(&self) -> Range<u64> {
        self.place.clone().unwrap_or_else(|| {
            let guess = (self.blob_size / GUESS).clamp(LEAST_GUESS, MOST_GUESS);
            self.blob_size.saturating_sub(guess)..self.blob_size
        })
    }

    /// Returns the bytes of the blob that are the table. `first` are the bytes of [`TableRef::first_range`]. The table
    /// ends with these bytes, or before them, and may begin before them.
    pub fn table_range(&self, first: &[u8]) -> Result<Range<u64>, CarriedError> {
        if let Some(place) = &self.place {
            return Ok(place.clone());
        }
        let Footer { table } = Footer::parse(first)?;
        let end = self.blob_size - Footer::SIZE;
        if table >= end {
            return Err(unusable("it begins behind its end"));
        }
        if end - table > MAX_PACKED {
            return Err(unusable("it is too large"));
        }
        Ok(table..end)
    }

    /// Returns where content ends in the blob, whose table is at `table`.
    pub(super) fn data_end(&self, table: &Range<u64>) -> u64 {
        match self.codec {
            ChunkCodec::Gzip => table.start,
            ChunkCodec::Zstd => table.start - SKIPPABLE_HEADER,
        }
    }
}

fn unusable(reason: &'static str) -> CarriedError {
    CarriedError::Unusable { reason }
}

fn digest(text: &str) -> Result<Digest, CarriedError> {
    text.parse()
        .map_err(|_| unusable("the descriptor has no digest of it that is known here"))
}

/// Reads the place of a table: offset, compressed and uncompressed length, and type, with colons between them.
fn position(text: &str, blob_size: u64) -> Result<Range<u64>, CarriedError> {
    const TYPE: u64 = 1;
    let bad = || unusable("the descriptor does not say where it is");
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b':');
    let numbers: Result<Vec<u64>, _> = text.splitn(5, ':').map(str::parse).collect();
    let numbers = numbers.map_err(|_| bad())?;
    let &[offset, packed, json, kind] = numbers.as_slice() else {
        return Err(bad());
    };
    if !plain || offset < SKIPPABLE_HEADER || packed == 0 {
        return Err(bad());
    }
    if kind != TYPE {
        return Err(unusable("it is of an unknown type"));
    }
    if packed > MAX_PACKED || json > MAX_JSON {
        return Err(unusable("it is too large"));
    }
    match offset.checked_add(packed) {
        Some(end) if end <= blob_size => Ok(offset..end),
        _ => Err(unusable("it ends behind the blob")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn found(pairs: &[(&str, &str)]) -> Result<Option<TableRef>, CarriedError> {
        TableRef::in_annotations(&annotations(pairs), 10_000)
    }

    #[test]
    fn every_dialect_is_recognised() {
        let (packed, json) = (Digest::of(b"packed").to_string(), Digest::of(b"json").to_string());
        let place = "1000:200:3000:1";
        assert_eq!(found(&[("other", "x")]), Ok(None));
        let table = found(&[(STARGZ_DIGEST, &json)]).unwrap().unwrap();
        assert_eq!((table.codec, table.first_range()), (ChunkCodec::Gzip, 0..10_000));
        for keys in [CONTAINERS, CONTAINERS_OLD] {
            let table = found(&[(keys[0], &packed), (keys[1], place)]).unwrap().unwrap();
            assert_eq!((table.codec, table.dialect), (ChunkCodec::Zstd, Dialect::Containers));
            assert_eq!(
                (table.first_range(), table.table_range(b"").unwrap()),
                (1000..1200, 1000..1200)
            );
            assert_eq!(table.data_end(&(1000..1200)), 992);
        }
        let [checksum, position] = CONTAINERS_OLD;
        let both = [(checksum, packed.as_str()), (position, place), (STARGZ_DIGEST, &json)];
        let table = found(&both).unwrap().unwrap();
        assert_eq!((table.codec, table.dialect), (ChunkCodec::Zstd, Dialect::Stargz));
        assert_eq!(
            (table.digest, table.packed),
            (Digest::of(b"json"), Some(Digest::of(b"packed")))
        );
        let [checksum, position] = CONTAINERS;
        assert!(found(&[(checksum, &packed), (position, place), (STARGZ_DIGEST, &json)]).is_err());
    }

    #[test]
    fn bad_annotations_name_no_table() {
        let [checksum, position] = CONTAINERS;
        let packed = Digest::of(b"packed").to_string();
        for place in [
            "",
            "1",
            "1000:200:3000",
            "1000:200:3000:1:5",
            "1000:200:3000:2",
            "+1000:200:3000:1",
            "7:200:3000:1",
            "1000:0:3000:1",
            "9900:200:3000:1",
            "18446744073709551615:200:3000:1",
            "1000:200:99999999999:1",
            "a:b:c:d",
            "-1000:200:3000:1",
            "99999999999999999999:1:1:1",
        ] {
            let found = found(&[(checksum, &packed), (position, place)]);
            assert!(
                matches!(found, Err(CarriedError::Unusable { .. })),
                "{place}: {found:?}"
            );
        }
        for digest in ["", "sha256:", "md5:00", &packed[..70]] {
            assert!(found(&[(STARGZ_DIGEST, digest)]).is_err(), "{digest}");
            assert!(
                found(&[(checksum, digest), (position, "1000:200:3000:1")]).is_err(),
                "{digest}"
            );
        }
        assert!(found(&[(checksum, &packed)]).is_err() && found(&[(position, "1000:200:3000:1")]).is_err());
        let tiny = TableRef::in_annotations(&annotations(&[(STARGZ_DIGEST, &packed)]), 51);
        assert!(tiny.is_err());
    }

    #[test]
    fn sources_differ_if_what_vouches_differs() {
        let digests = [Digest::of(b"a").to_string(), Digest::of(b"b").to_string()];
        let [checksum, position] = CONTAINERS;
        let sources = [
            found(&[(STARGZ_DIGEST, &digests[0])]),
            found(&[(STARGZ_DIGEST, &digests[1])]),
            found(&[(checksum, &digests[0]), (position, "1000:200:3000:1")]),
            found(&[(checksum, &digests[0]), (position, "1001:200:3000:1")]),
        ]
        .map(|table| table.unwrap().unwrap().source());
        for (at, source) in sources.iter().enumerate() {
            assert!(!sources[..at].contains(source), "{at}");
        }
    }
}
