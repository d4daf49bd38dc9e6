//! Profiles: what the start of a program reads, learned from earlier runs.
//!
//! A [`Recorder`] listens while a program starts. It notes which blocks of which layer's data device were
//! read, in order. A [`Profile`] is what several such runs have in common. It is kept for an image manifest under a
//! [`Label`], because one image starts different programs. Device addresses follow from the layer's tar alone. A
//! profile is therefore as good for the same layers in another image or on another machine, compressed or indexed in
//! another way.
//!
//! A profile is a hint. A wrong one costs bandwidth that no other request needs, and never a wrong byte. Files from
//! elsewhere are therefore checked only for sizes, which could do harm.
//!
//! # The file
//! ```json
//! {"ocifs-profile": 2, "manifest": "sha256:…", "label": "default", "runs": 3,
//!  "layers": [{"digest": "sha256:…", "diff_id": "sha256:…"}],
//!  "ranges": [[0, 1048576, 65536, 12, 4]]}
//! ```
//! A range has five numbers. The first is the position of its layer in `layers`. Offset and length in that layer's
//! data device follow (bytes, multiples of [`BLOCK`]). The fourth number is the milliseconds from the mount being
//! ready to the first read of the range. The last is its score. Ranges are in the order of their first reads.
//!
//! The file for other hosts is the same, compressed with zstd.
//!
//! In version 1 of the format, offset and length are those in the layer's tar ([`Space::Tar`]). Such a profile is
//! translated when the layers are open (`Profile::in_devices`).
//!
//! # Several runs
//! A block that is read for the first time scores `FIRST_SCORE`. Each later run that reads the block adds one, up
//! to `BEST_SCORE`. Each run that does not read it takes one away, and at zero the block is forgotten. The order is
//! that of the last run. The blocks that the last run did not read follow.

mod format;
mod recorder;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::str::FromStr;

pub use format::{LARGEST_FILE, ProfileError};
pub use recorder::Recorder;

use crate::oci::{DiffId, Digest};

/// Bytes to which reads are rounded: a few pages. With smaller blocks, runs would disagree, because the kernel reads
/// ahead differently each time. Larger blocks would fetch more bytes that no run reads.
pub const BLOCK: u64 = 16 << 10;
/// Most blocks in a profile: one gigabyte, more than any start needs. A larger bound lets a profile fetch more bytes
/// that no reader needs; a smaller one cuts the profiles of large starts.
pub(crate) const MOST_BLOCKS: usize = 1 << 16;
/// Longest profile in bytes that is given to other hosts. A longer one would be slower to come than the index of a layer.
pub const MOST_PUBLISHED: usize = 32 << 10;
/// Score of a block that one run has read. A larger score keeps blocks for longer that only one run reads; a smaller
/// one forgets blocks that one run happens not to read.
pub(crate) const FIRST_SCORE: u8 = 2;
/// Highest score. After this many runs without the block, the block is forgotten. A larger score keeps blocks for
/// longer that no run reads; a smaller one forgets blocks that some runs do not read.
pub(crate) const BEST_SCORE: u8 = 4;

/// Names the program of an image that a profile is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Label(String);

impl Label {
    /// Returns the label as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Label {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if text.is_empty() || text.len() > 64 || text.starts_with('.') || !text.chars().all(allowed) {
            return Err("a label is 1 to 64 letters, digits, `.`, `_` and `-`, and does not begin with `.`".to_owned());
        }
        Ok(Self(text.to_owned()))
    }
}

/// A layer in a profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfiledLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Digest of the tar.
    pub diff_id: DiffId,
}

/// The space in which the offsets of a profile count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Offsets in the layers' data devices.
    Device,
    /// Offsets in the layers' tars, as in version 1 of the format.
    Tar,
}

/// A block of a layer's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// Position of the layer.
    pub layer: u32,
    /// Number of the block: its offset over [`BLOCK`].
    pub number: u64,
}

/// A block that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// The block.
    pub block: Block,
    /// Milliseconds from the mount being ready to the read.
    pub at: u32,
    /// The block's score, as the module documentation explains.
    pub score: u8,
}

/// What runs of an image's program read, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Manifest of the image.
    pub manifest: Digest,
    /// The program that runs.
    pub label: Label,
    /// Number of runs that the profile has learned from.
    pub runs: u32,
    /// Layers of the image, base first.
    pub layers: Vec<ProfiledLayer>,
    /// The space in which the numbers of blocks count.
    pub space: Space,
    /// Each block once, in the order of first reads; at most `MOST_BLOCKS`.
    pub touches: Vec<Touch>,
}

impl Profile {
    /// Returns a profile of no runs.
    pub fn new(manifest: Digest, label: Label, layers: Vec<ProfiledLayer>) -> Self {
        Self {
            manifest,
            label,
            runs: 0,
            layers,
            space: Space::Device,
            touches: Vec::new(),
        }
    }

    /// Returns the profile by device address. `of_tar` takes the position of a layer and a range of its tar. It
    /// returns where the content of that range is in the layer's data device.
    pub(crate) fn in_devices(mut self, of_tar: impl Fn(usize, Range<u64>) -> Vec<Range<u64>>) -> Self {
        if self.space == Space::Device {
            return self;
        }
        let mut seen = HashSet::new();
        let mut touches = Vec::new();
        for touch in &self.touches {
            let layer = touch.block.layer;
            let start = touch.block.number * BLOCK;
            for device in of_tar(layer as usize, start..start + BLOCK) {
                for number in device.start / BLOCK..device.end.div_ceil(BLOCK) {
                    let block = Block { layer, number };
                    if seen.insert(block) {
                        touches.push(Touch { block, ..*touch });
                    }
                }
            }
        }
        touches.truncate(MOST_BLOCKS);
        (self.space, self.touches) = (Space::Device, touches);
        self
    }

    /// Learns from a run: from blocks of data devices and the milliseconds after which they were read. `run` is in
    /// order, with each block once. The profile must be one by device address.
    pub(crate) fn learn(&mut self, run: &[(Block, u32)]) {
        let mut known: HashMap<Block, u8> = self.touches.iter().map(|t| (t.block, t.score)).collect();
        let mut touches: Vec<Touch> = run
            .iter()
            .map(|&(block, at)| {
                let score = match known.remove(&block) {
                    Some(score) => (score + 1).min(BEST_SCORE),
                    None => FIRST_SCORE,
                };
                Touch { block, at, score }
            })
            .collect();
        // The blocks left in `known` are those that this run did not read.
        let faded = self.touches.iter().filter(|t| known.contains_key(&t.block));
        touches.extend(faded.filter(|t| t.score > 1).map(|t| Touch {
            score: t.score - 1,
            ..*t
        }));
        touches.truncate(MOST_BLOCKS);
        self.touches = touches;
        self.runs = self.runs.saturating_add(1);
    }

    /// Takes over what another profile knows. If both are about the same layers, takes over everything. Otherwise
    /// takes over what the other profile says about shared layers, as if one earlier run had read it.
    pub(crate) fn adopt(&mut self, other: &Self) {
        let diff_ids = |profile: &Self| profile.layers.iter().map(|l| l.diff_id.clone()).collect::<Vec<_>>();
        self.space = other.space;
        if diff_ids(self) == diff_ids(other) {
            (self.runs, self.touches) = (other.runs, other.touches.clone());
            return;
        }
        let place = |layer: &ProfiledLayer| self.layers.iter().position(|l| l.diff_id == layer.diff_id);
        let places: Vec<Option<usize>> = other.layers.iter().map(place).collect();
        // An image can have a layer twice.
        let mut seen = HashSet::new();
        let known = other.touches.iter().filter_map(|touch| {
            let layer = places.get(touch.block.layer as usize).copied().flatten()? as u32;
            let block = Block { layer, ..touch.block };
            seen.insert(block).then_some(Touch {
                block,
                score: FIRST_SCORE.min(touch.score),
                ..*touch
            })
        });
        self.touches = known.collect();
    }

    /// Returns the file of the profile for other hosts, of about `most` bytes at most. If all blocks do not fit, leaves out
    /// those that fewer runs read, and of these the ones that are read last.
    pub fn encode_within(&self, most: usize) -> io::Result<Vec<u8>> {
        let whole = self.encode_compressed()?;
        if whole.len() <= most {
            return Ok(whole);
        }
        let mut useful: Vec<usize> = (0..self.touches.len()).collect();
        useful.sort_by_key(|&i| (std::cmp::Reverse(self.touches[i].score), self.touches[i].at, i));
        let first = |count: usize| {
            let mut kept = useful[..count].to_vec();
            kept.sort_unstable();
            let touches = kept.into_iter().map(|i| self.touches[i]).collect();
            Self {
                touches,
                ..self.clone()
            }
            .encode_compressed()
        };
        let mut longest = first(0)?;
        let (mut fits, mut too_many) = (0, useful.len());
        while too_many - fits > 1 {
            let middle = fits.midpoint(too_many);
            let file = first(middle)?;
            match file.len() <= most {
                true => (fits, longest) = (middle, file),
                false => too_many = middle,
            }
        }
        Ok(longest)
    }

    /// Returns the bytes of content that the profile names.
    pub fn bytes(&self) -> u64 {
        self.touches.len() as u64 * BLOCK
    }

    /// Returns what to read, in order: the position of a layer and a range in its [`Space`].
    pub fn ranges(&self) -> impl Iterator<Item = (usize, Range<u64>)> {
        self.touches.iter().map(|touch| {
            let start = touch.block.number * BLOCK;
            (touch.block.layer as usize, start..start + BLOCK)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u64) -> Block {
        Block { layer: 0, number }
    }

    fn profile() -> Profile {
        let layer = ProfiledLayer {
            digest: Digest::of(b"blob"),
            diff_id: DiffId(Digest::of(b"tar")),
        };
        Profile::new(Digest::of(b"manifest"), Label::default(), vec![layer])
    }

    fn known(profile: &Profile) -> Vec<(u64, u8)> {
        profile.touches.iter().map(|t| (t.block.number, t.score)).collect()
    }

    #[test]
    fn what_runs_agree_on_stays_and_the_rest_fades() {
        let mut profile = profile();
        profile.learn(&[(block(5), 0), (block(1), 3)]);
        assert_eq!(known(&profile), [(5, 2), (1, 2)]);
        profile.learn(&[(block(1), 1), (block(7), 2)]);
        assert_eq!(known(&profile), [(1, 3), (7, 2), (5, 1)]);
        profile.learn(&[(block(1), 1)]);
        assert_eq!(known(&profile), [(1, 4), (7, 1)]);
        profile.learn(&[(block(1), 1)]);
        assert_eq!((known(&profile), profile.runs), (vec![(1, 4)], 4));
    }

    #[test]
    fn shared_layers_bring_what_is_known_of_them() {
        let mut old = profile();
        old.learn(&[(block(5), 0)]);
        old.learn(&[(block(5), 0)]);
        let mut new = profile();
        let shared = new.layers[0].clone();
        new.layers.insert(
            0,
            ProfiledLayer {
                digest: Digest::of(b"other"),
                diff_id: DiffId(Digest::of(b"other tar")),
            },
        );
        // The same tar, compressed in another way.
        new.layers[1] = ProfiledLayer {
            digest: Digest::of(b"recompressed"),
            ..shared
        };
        new.adopt(&old);
        assert_eq!(new.ranges().collect::<Vec<_>>(), [(1, 5 * BLOCK..6 * BLOCK)]);
        assert_eq!((new.touches[0].score, new.runs), (FIRST_SCORE, 0));
        old.space = Space::Tar;
        // The same image, compressed in another way.
        let mut twin = profile();
        twin.layers[0].digest = Digest::of(b"recompressed");
        twin.adopt(&old);
        assert_eq!((&twin.touches, twin.runs, twin.space), (&old.touches, 2, Space::Tar));
    }

    #[test]
    fn a_profile_of_tars_is_translated() {
        let mut old = profile();
        old.learn(&[(block(3), 7), (block(0), 9)]);
        old.space = Space::Tar;
        // Content lies in the tar behind a header of 512 bytes, and in the device from 0 on.
        let new = old.in_devices(|layer, tar| {
            assert_eq!(layer, 0);
            let start = tar.start.saturating_sub(512)..tar.end - 512;
            vec![start]
        });
        assert_eq!((new.space, known(&new)), (Space::Device, vec![(2, 2), (3, 2), (0, 2)]));
        assert_eq!((new.touches[1].at, new.touches[2].at), (7, 9));
        assert_eq!(new.clone().in_devices(|_, _| Vec::new()), new);
    }

    #[test]
    fn a_profile_for_others_leaves_out_what_is_read_least_and_last() {
        let touch = |i: u64| Touch {
            block: block(3 * i),
            at: i as u32,
            score: if i.is_multiple_of(3) { BEST_SCORE } else { FIRST_SCORE },
        };
        let long = Profile {
            touches: (0..12_000).map(touch).collect(),
            ..profile()
        };
        assert!(long.encode_compressed().unwrap().len() > MOST_PUBLISHED);
        let short = long.encode_within(MOST_PUBLISHED).unwrap();
        assert!(
            (MOST_PUBLISHED - 200..=MOST_PUBLISHED).contains(&short.len()),
            "{}",
            short.len()
        );
        let short = Profile::decode(&short).unwrap();
        let of = |profile: &Profile, score| profile.touches.iter().filter(|t| t.score == score).count();
        assert_eq!(of(&short, BEST_SCORE), of(&long, BEST_SCORE));
        let rare = short.touches.iter().filter(|t| t.score == FIRST_SCORE).map(|t| t.at);
        let earliest = long.touches.iter().filter(|t| t.score == FIRST_SCORE).map(|t| t.at);
        assert!(rare.clone().eq(earliest.take(rare.count())));
        assert!(short.touches.is_sorted_by_key(|t| t.at));
        let whole = long.encode_within(1 << 20).unwrap();
        assert_eq!(Profile::decode(&whole).unwrap(), long);
    }

    #[test]
    fn labels_are_words() {
        for good in ["default", "python-3.11", "a_b"] {
            assert_eq!(good.parse::<Label>().unwrap().to_string(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", &"x".repeat(65)] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
    }
}
