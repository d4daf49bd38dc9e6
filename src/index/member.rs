//! Decodes single members of a gzip blob, or single frames of a zstd blob.
//!
//! A writer's own table of contents says at which bytes of the blob members begin, so no index is needed to begin there.
//! A decoder is used for one member after another, and what is behind the wanted bytes of a member is left out.

use super::gzip::Gzip;
use super::step::Step;
use super::zstd::{Room, Zstd};
use super::{BitPosition, Compression, IndexError};

/// A decoder that can begin at every member or frame of a blob.
#[derive(Debug)]
pub struct MemberDecoder(MemberCodec);

#[derive(Debug)]
enum MemberCodec {
    Gzip(Box<Gzip>),
    Zstd(Box<Zstd>),
    Tar,
}

impl MemberDecoder {
    /// Makes a decoder. [`MemberDecoder::seek`] says where the first member begins. The decoder asks `room` for memory.
    pub fn new(compression: Compression, room: Room) -> Result<Self, IndexError> {
        Ok(Self(match compression {
            Compression::Gzip => MemberCodec::Gzip(Box::new(Gzip::new())),
            Compression::Zstd => MemberCodec::Zstd(Box::new(Zstd::new(0, room)?)),
            Compression::Tar => MemberCodec::Tar,
        }))
    }

    /// Forgets the member that was being decoded. The next byte of input begins the member at blob offset `offset`.
    pub fn seek(&mut self, offset: u64) -> Result<(), IndexError> {
        match &mut self.0 {
            MemberCodec::Gzip(gzip) => **gzip = Gzip::at_member(offset),
            MemberCodec::Zstd(zstd) => zstd.seek(offset)?,
            MemberCodec::Tar => {}
        }
        Ok(())
    }

    /// Decodes some input, and returns some output. Returns none only after all input is consumed.
    pub fn decode<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Option<&'a [u8]>, IndexError> {
        let step = match &mut self.0 {
            MemberCodec::Gzip(gzip) => gzip.step(input)?,
            MemberCodec::Zstd(zstd) => zstd.step(input)?,
            MemberCodec::Tar if input.is_empty() => Step::Input,
            MemberCodec::Tar => Step::Output {
                bytes: std::mem::take(input),
                position: BitPosition(0),
            },
        };
        match step {
            Step::Output { bytes, .. } => Ok(Some(bytes)),
            // Nobody asked for restarts.
            Step::Input | Step::Restart(_) | Step::Candidate(_) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::index::zstd::room_within;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn decoded(decoder: &mut MemberDecoder, mut input: &[u8], most: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = decoder.decode(&mut input).unwrap() {
            all.extend_from_slice(bytes);
            if all.len() >= most {
                break;
            }
        }
        all
    }

    #[test]
    fn decoding_begins_at_any_member_and_may_end_within_one() {
        let text: Vec<u8> = (0..300_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let parts = [&text[..100], &text[100..900_000], &text[900_000..]];
        for compression in [Compression::Gzip, Compression::Zstd] {
            let members = parts.map(|part| match compression {
                Compression::Gzip => gzip(part),
                _ => zstd::encode_all(part, 3).unwrap(),
            });
            let mut decoder = MemberDecoder::new(compression, room_within(64 << 20)).unwrap();
            // The second member is left in the middle.
            for (number, most) in [(2, usize::MAX), (1, 5000), (0, usize::MAX), (1, usize::MAX)] {
                let offset = members[..number].iter().map(Vec::len).sum::<usize>();
                decoder.seek(offset as u64).unwrap();
                let bytes = decoded(&mut decoder, &members[number], most);
                assert!(bytes.len() >= most.min(parts[number].len()), "{compression}");
                assert!(parts[number].starts_with(&bytes), "{compression}");
            }
            decoder.seek(7).unwrap();
            let mut junk = &b"neither gzip nor zstd"[..];
            assert!(decoder.decode(&mut junk).is_err());
        }
    }
}
