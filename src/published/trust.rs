//! Who vouches for the files of a place.

use std::fmt;
use std::path::Path;

use minisign_verify::{PublicKey, Signature};

use super::PublishedError;
use crate::store::Authority;

/// Size limit in bytes of a key file. Real ones have about 110.
const LONGEST_KEY: u64 = 4096;

/// A public key of minisign(1).
#[derive(Clone)]
pub struct IndexKey {
    /// How people call it: the name of its file, or its id.
    name: String,
    /// The key in base64, which is how two keys are compared.
    encoded: String,
    key: PublicKey,
}

impl fmt::Debug for IndexKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IndexKey").field(&self.name).finish()
    }
}

impl IndexKey {
    /// Reads a key: the path of the file that `minisign -G` writes, or the line of such a file that begins with `RW`.
    pub fn read(text: &str) -> Result<Self, PublishedError> {
        let fail = |reason: String| PublishedError::Key {
            key: text.to_owned(),
            reason,
        };
        if let Ok(key) = PublicKey::from_base64(text.trim()) {
            let encoded = text.trim().to_owned();
            return Ok(Self {
                // The first characters are the same for all keys.
                name: encoded.chars().skip(4).take(8).collect(),
                encoded,
                key,
            });
        }
        let path = Path::new(text);
        let content = crate::os::read_regular(path, LONGEST_KEY).map_err(|error| fail(error.to_string()))?;
        let content = String::from_utf8(content).map_err(|_| fail("it is no text".to_owned()))?;
        let line = content.lines().map(str::trim).rfind(|line| !line.is_empty());
        let encoded = line.unwrap_or_default().to_owned();
        let key = PublicKey::from_base64(&encoded).map_err(|error| fail(error.to_string()))?;
        Ok(Self {
            name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            encoded,
            key,
        })
    }

    /// Returns the name of the key.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Checks that `signature` is one of `bytes` with this key. `file` names the file in errors.
    fn verify(&self, file: &str, bytes: &[u8], signature: &str) -> Result<(), PublishedError> {
        let fail = |error: minisign_verify::Error| PublishedError::Signature {
            file: file.to_owned(),
            key: self.name.clone(),
            reason: error.to_string(),
        };
        let signature = Signature::decode(signature).map_err(fail)?;
        self.key.verify(bytes, &signature, false).map_err(fail)
    }
}

/// Who vouches for the files of a place.
#[derive(Debug, Clone)]
pub enum Trust {
    /// The owner of a key, who signed each file. The place itself need not be trusted.
    Key(IndexKey),
    /// The place: nobody can put files there whom the user does not trust.
    Location,
}

impl Trust {
    /// Returns how the authority of a file at `location` is called.
    pub(super) fn authority(&self, location: &str) -> Authority {
        match self {
            Self::Key(key) => Authority::Key {
                name: key.name.clone(),
                key: key.encoded.clone().into_bytes(),
            },
            Self::Location => Authority::Location {
                location: location.to_owned(),
            },
        }
    }

    /// Whether a file needs a signature.
    pub(super) fn wants_signature(&self) -> bool {
        matches!(self, Self::Key(_))
    }

    /// Checks a file before any byte of it is parsed.
    pub(super) fn check(&self, file: &str, bytes: &[u8], signature: Option<&str>) -> Result<(), PublishedError> {
        match (self, signature) {
            (Self::Location, _) => Ok(()),
            (Self::Key(key), Some(signature)) => key.verify(file, bytes, signature),
            (Self::Key(_), None) => Err(PublishedError::Unsigned { file: file.to_owned() }),
        }
    }
}
