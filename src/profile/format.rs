//! Reads and writes profile files.

use std::io::{self, Read as _};

use serde::{Deserialize, Serialize};

use super::{BEST_SCORE, BLOCK, Block, Label, MOST_BLOCKS, Profile, ProfiledLayer, Space, Touch};
use crate::oci::{DiffId, Digest};

/// Version of the format by device address.
const VERSION: u32 = 2;
/// Earlier version of the format, by offset in the tar.
const VERSION_OF_TARS: u32 = 1;
/// Bytes of the largest file that is read. A file of the most blocks, each a range of its own, is smaller.
pub const LARGEST_FILE: usize = 8 << 20;
/// What a file for other hosts begins with: a frame of zstd (RFC 8878, 3.1.1).
const ZSTD_MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();
/// Level of zstd. Higher levels take much more time and save a few per cent.
const LEVEL: i32 = 12;
/// Window of zstd that is accepted, as a binary logarithm: that of the largest file.
const WINDOW_LOG_MAX: u32 = LARGEST_FILE.ilog2();
/// Most layers in a profile. No image has more.
const MOST_LAYERS: usize = 4096;

/// Why a file is no profile.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The file cannot be read.
    #[error("cannot read it: {0}")]
    Io(#[from] std::io::Error),
    /// The file is not the JSON of a profile.
    #[error("not a profile: {0}")]
    Json(#[from] serde_json::Error),
    /// The file has another version of the format.
    #[error("a profile of format version {found}, this program knows {VERSION}")]
    Version {
        /// Version in the file.
        found: u32,
    },
    /// The content of the file makes no sense, or is too large.
    #[error("not a profile: {reason}")]
    Invalid {
        /// What is wrong.
        reason: &'static str,
    },
}

#[derive(Serialize, Deserialize)]
struct ProfileFile {
    #[serde(rename = "ocifs-profile")]
    version: u32,
    manifest: Digest,
    label: String,
    runs: u32,
    layers: Vec<ProfileFileLayer>,
    /// Layer, offset, length, milliseconds, score.
    ranges: Vec<(u32, u64, u64, u32, u8)>,
}

#[derive(Serialize, Deserialize)]
struct ProfileFileLayer {
    digest: Digest,
    diff_id: Digest,
}

/// The version alone, which decides whether the rest can be understood.
#[derive(Deserialize)]
struct Head {
    #[serde(rename = "ocifs-profile")]
    version: u32,
}

impl Profile {
    /// Returns the bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut ranges: Vec<(u32, u64, u64, u32, u8)> = Vec::new();
        for touch in &self.touches {
            let Touch { block, at, score } = *touch;
            let start = block.number * BLOCK;
            match ranges.last_mut() {
                Some((layer, offset, length, began, last))
                    if (*layer, *offset + *length, *began, *last) == (block.layer, start, at, score) =>
                {
                    *length += BLOCK;
                }
                _ => ranges.push((block.layer, start, BLOCK, at, score)),
            }
        }
        let layers = self.layers.iter().map(|layer| ProfileFileLayer {
            digest: layer.digest.clone(),
            diff_id: layer.diff_id.0.clone(),
        });
        let file = ProfileFile {
            version: match self.space {
                Space::Device => VERSION,
                Space::Tar => VERSION_OF_TARS,
            },
            manifest: self.manifest.clone(),
            label: self.label.to_string(),
            runs: self.runs,
            layers: layers.collect(),
            ranges,
        };
        serde_json::to_vec(&file).expect("strings and numbers")
    }

    /// Returns the bytes of the file for other hosts: the same, compressed.
    pub(super) fn encode_compressed(&self) -> io::Result<Vec<u8>> {
        zstd::bulk::compress(&self.encode(), LEVEL)
    }

    /// Parses a file, which may come from anywhere, and which has to be of this image and label.
    pub fn decode_of(bytes: &[u8], manifest: &Digest, label: &Label) -> Result<Self, ProfileError> {
        let profile = Self::decode(bytes)?;
        match profile.manifest == *manifest && profile.label == *label {
            true => Ok(profile),
            false => Err(ProfileError::Invalid {
                reason: "it is of another image or label",
            }),
        }
    }

    /// Parses a file, which may come from anywhere. It may be compressed.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProfileError> {
        match bytes.starts_with(&ZSTD_MAGIC) {
            true => Self::decode_plain(&decompress(bytes)?),
            false => Self::decode_plain(bytes),
        }
    }

    fn decode_plain(bytes: &[u8]) -> Result<Self, ProfileError> {
        let invalid = |reason| Err(ProfileError::Invalid { reason });
        if bytes.len() > LARGEST_FILE {
            return invalid("it is larger than 8 MiB");
        }
        let found = serde_json::from_slice::<Head>(bytes)?.version;
        let space = match found {
            VERSION => Space::Device,
            VERSION_OF_TARS => Space::Tar,
            found => return Err(ProfileError::Version { found }),
        };
        let file: ProfileFile = serde_json::from_slice(bytes)?;
        let Ok(label) = file.label.parse::<Label>() else {
            return invalid("its label is not one");
        };
        if file.layers.len() > MOST_LAYERS {
            return invalid("it has too many layers");
        }
        let mut touches = Vec::new();
        let mut blocks = 0;
        let mut seen = std::collections::HashSet::new();
        for (layer, start, length, at, score) in file.ranges {
            if layer as usize >= file.layers.len() {
                return invalid("a range is in no layer");
            }
            if start % BLOCK != 0 || length % BLOCK != 0 || start.checked_add(length).is_none() {
                return invalid("a range is not of whole blocks");
            }
            // Blocks that are named twice count twice, because each takes time to read.
            if length / BLOCK > MOST_BLOCKS as u64 - blocks {
                return invalid("it covers more than 1 GiB");
            }
            blocks += length / BLOCK;
            for number in start / BLOCK..(start + length) / BLOCK {
                let block = Block { layer, number };
                if seen.insert(block) {
                    let score = score.clamp(1, BEST_SCORE);
                    touches.push(Touch { block, at, score });
                }
            }
        }
        let layers = file.layers.into_iter().map(|layer| ProfiledLayer {
            digest: layer.digest,
            diff_id: DiffId(layer.diff_id),
        });
        Ok(Self {
            manifest: file.manifest,
            label,
            runs: file.runs,
            layers: layers.collect(),
            space,
            touches,
        })
    }
}

/// Decompresses a file, as far as it may be read.
fn decompress(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(bytes)?;
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    let mut plain = Vec::new();
    decoder.take(LARGEST_FILE as u64 + 1).read_to_end(&mut plain)?;
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Profile {
        let layer = |name: &[u8]| ProfiledLayer {
            digest: Digest::of(name),
            diff_id: DiffId(Digest::of(b"tar")),
        };
        let mut profile = Profile::new(
            Digest::of(b"manifest"),
            "web".parse().unwrap(),
            vec![layer(b"a"), layer(b"b")],
        );
        let block = |layer, number| Block { layer, number };
        profile.learn(&[
            (block(1, 7), 3),
            (block(1, 8), 3),
            (block(0, 1 << 40), 9),
            (block(1, 9), 9),
        ]);
        profile
    }

    #[test]
    fn what_is_written_is_read() {
        let encoded = profile().encode();
        assert_eq!(Profile::decode(&encoded).unwrap(), profile());
        let text = String::from_utf8(encoded).unwrap();
        let old = text.replace("profile\":2", "profile\":1");
        let of_tars = Profile::decode(old.as_bytes()).unwrap();
        assert_eq!(of_tars.space, Space::Tar);
        assert_eq!(of_tars.encode(), old.as_bytes());
        assert!(
            text.contains("[1,114688,32768,3,2]"),
            "neighbours are one range: {text}"
        );
    }

    #[test]
    fn compressed_files_are_read_as_far_as_plain_ones() {
        let encoded = profile().encode_compressed().unwrap();
        assert_eq!(Profile::decode(&encoded).unwrap(), profile());
        for cut in 4..encoded.len() {
            assert!(Profile::decode(&encoded[..cut]).is_err());
        }
        let compress = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
        assert!(Profile::decode(&compress(b"not json")).is_err());
        let long = compress(&vec![b' '; 2 * LARGEST_FILE]);
        assert!(Profile::decode(&long).unwrap_err().to_string().contains("8 MiB"));
        // A window that no profile needs.
        let mut wide = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        wide.window_log(27).unwrap();
        io::Write::write_all(&mut wide, &profile().encode()).unwrap();
        let error = Profile::decode(&wide.finish().unwrap()).unwrap_err();
        assert!(matches!(error, ProfileError::Io(_)), "{error}");
    }

    #[test]
    fn bad_files_are_refused_with_a_reason() {
        let good = String::from_utf8(profile().encode()).unwrap();
        let refused = |text: String, reason: &str| {
            let error = Profile::decode(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        };
        refused("{}".into(), "missing field `ocifs-profile`");
        refused(good.replace("profile\":2", "profile\":3"), "version 3");
        refused(good.replace("\"web\"", "\"../web\""), "label");
        refused(good.replace("[1,114688", "[2,114688"), "no layer");
        refused(good.replace("[1,114688", "[1,114689"), "whole blocks");
        refused(
            good.replace("114688,32768", "18446744073709535232,32768"),
            "whole blocks",
        );
        refused(good.replace(",32768,", ",1099511627776,"), "more than 1 GiB");
        let often = "[1,0,536870912,3,2],".repeat(3);
        refused(
            good.replace("[1,114688", &format!("{often}[1,114688")),
            "more than 1 GiB",
        );
        refused(" ".repeat(LARGEST_FILE + 1), "8 MiB");
    }
}
