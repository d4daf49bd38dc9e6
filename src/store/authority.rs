//! Who vouches for the index of a layer.
//!
//! An index decides what the files of a layer contain. So the store keeps the indexes of a layer apart by the authority
//! that vouches for them, each with a data device of its own. An index whose authority is not trusted any more stays
//! where it is, and is not looked at.

use std::fmt;
use std::sync::Arc;

use crate::oci::Digest;

/// Who vouches for the index of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// A pass over the whole layer on this host, which compared the layer with its digest and diffID.
    Pass,
    /// The manifest of the image: it names the digest of the layer's own table of contents.
    Manifest {
        /// Digest of the table.
        table: Digest,
    },
    /// The owner of a key who signed the index.
    Key {
        /// Name of the key, for people.
        name: String,
        /// The public key.
        key: Vec<u8>,
    },
    /// The place where the index was found, because the user trusts that place.
    Location {
        /// The place as the user wrote it.
        location: String,
    },
}

impl Authority {
    /// Returns what the name of the index's directory ends with. The end differs for each authority.
    fn suffix(&self) -> String {
        // 128 bits: nobody can make a second key, location or table with the same ones.
        let short = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..32].to_owned();
        match self {
            Self::Pass => String::new(),
            Self::Manifest { table } => format!(".manifest-{}", short(table.to_string().as_bytes())),
            Self::Key { key, .. } => format!(".key-{}", short(key)),
            Self::Location { location } => format!(".location-{}", short(location.as_bytes())),
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => f.write_str("pass"),
            Self::Manifest { .. } => f.write_str("manifest"),
            Self::Key { name, .. } => write!(f, "key {name}"),
            Self::Location { location } => write!(f, "location {location}"),
        }
    }
}

/// Names the index of a layer by one authority.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IndexName(Arc<str>);

impl IndexName {
    /// Returns the name of the index of `layer` that `authority` vouches for.
    pub fn new(layer: &Digest, authority: &Authority) -> Self {
        let name = format!("{}-{}{}", layer.algorithm().name(), layer.hex(), authority.suffix());
        Self(name.into())
    }

    /// Whether a pass on this host made the index.
    pub(crate) fn is_of_pass(&self) -> bool {
        !self.0.contains('.')
    }

    /// Returns the name, which is that of a file without a path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_authority_has_a_name_of_its_own() {
        let layer = Digest::of(b"layer");
        let location = |location: &str| Authority::Location {
            location: location.to_owned(),
        };
        let key = |key: &[u8]| Authority::Key {
            name: "ci".to_owned(),
            key: key.to_vec(),
        };
        let table = |table: &[u8]| Authority::Manifest {
            table: Digest::of(table),
        };
        let all = [
            Authority::Pass,
            location("/a"),
            location("/b"),
            key(b"a"),
            key(b"b"),
            table(b"a"),
            table(b"b"),
        ];
        let names: std::collections::HashSet<IndexName> = all.iter().map(|a| IndexName::new(&layer, a)).collect();
        assert_eq!(names.len(), all.len());
        assert_eq!(names.iter().filter(|name| name.is_of_pass()).count(), 1);
    }
}
