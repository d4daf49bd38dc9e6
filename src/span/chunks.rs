//! The spans of a layer that carries a table of its own: each chunk of the table is a span.
//!
//! The chunks of one member share a restart, the start of that member. A decoder passes over the headers between them.

use std::ops::Range;
use std::sync::Arc;
use std::{fmt, vec};

use sha2::{Digest as _, Sha256};

use super::{DecodeSpans, Piece, SpanMap};
use crate::index::{Compression, IndexError, MemberDecoder, Room, SpanId};
use crate::oci::Digest;
use crate::toc::{Chunk, ChunkCodec, ChunkTable, ExtentTable};

/// A chunk table, together with the runs of content in the data device.
#[derive(Debug)]
pub struct ChunkSpans {
    layer: Digest,
    table: ChunkTable,
    extents: ExtentTable,
    heads: Arc<[u64]>,
    key: [u8; 32],
}

impl ChunkSpans {
    /// Combines the chunks of the layer `layer` with its extents. Returns none if they are not of the same layer: every
    /// chunk must be in an extent, and the chunks must fill the extents.
    pub fn new(layer: Digest, table: ChunkTable, extents: ExtentTable) -> Option<Self> {
        if table.device_size() != extents.device_size() {
            return None;
        }
        let mut hasher = blake3::Hasher::new();
        let mut chunks = table.chunks().iter();
        for extent in extents.iter() {
            let (mut at, end) = (extent.device, extent.device + extent.len);
            while at < end {
                let chunk = chunks.next().filter(|chunk| chunk.device == at)?.range();
                at = chunk.end;
            }
            if at > end {
                return None;
            }
        }
        if chunks.next().is_some() {
            return None;
        }
        for chunk in table.chunks() {
            for number in [chunk.device, u64::from(chunk.len), chunk.member.start, chunk.inner] {
                hasher.update(&number.to_le_bytes());
            }
            hasher.update(&chunk.digest);
        }
        let heads = table.chunks().iter().map(|chunk| chunk.device);
        Some(Self {
            heads: heads.collect(),
            key: *hasher.finalize().as_bytes(),
            layer,
            table,
            extents,
        })
    }

    /// Returns the chunks.
    pub fn table(&self) -> &ChunkTable {
        &self.table
    }

    /// Returns the extents.
    pub fn extents(&self) -> &ExtentTable {
        &self.extents
    }

    /// Returns the bytes of memory that grow with the number of chunks and files.
    pub fn memory(&self) -> u64 {
        self.table.bytes() + self.extents.bytes().len() as u64 + size_of_val(&*self.heads) as u64
    }

    fn chunk(&self, span: u32) -> &Chunk {
        &self.table.chunks()[span as usize]
    }
}

impl SpanMap for ChunkSpans {
    fn layer(&self) -> &Digest {
        &self.layer
    }

    fn device_size(&self) -> u64 {
        self.table.device_size()
    }

    fn heads(&self) -> &Arc<[u64]> {
        &self.heads
    }

    fn key(&self) -> [u8; 32] {
        self.key
    }

    fn content(&self, device: Range<u64>) -> Option<Range<u64>> {
        self.extents.content_in_device(device)
    }

    fn run_around(&self, device: u64) -> Option<Range<u64>> {
        self.extents.run_around(device)
    }

    fn pieces(&self, span: u32) -> Vec<Piece> {
        let chunk = self.chunk(span);
        vec![Piece {
            span: 0,
            device: chunk.device,
            len: u64::from(chunk.len),
        }]
    }

    fn decoded_size(&self, span: u32) -> u64 {
        u64::from(self.chunk(span).len)
    }

    fn restart_for(&self, span: u32) -> u32 {
        self.group(span).start
    }

    fn group(&self, span: u32) -> Range<u32> {
        let (chunks, member) = (self.table.chunks(), self.chunk(span).member.start);
        let start = chunks.partition_point(|chunk| chunk.member.start < member);
        let end = chunks.partition_point(|chunk| chunk.member.start <= member);
        // A table has fewer chunks than a `u32` can count.
        start as u32..end as u32
    }

    fn blob_size(&self) -> u64 {
        self.table.blob_size()
    }

    fn blob_range(&self, spans: Range<u32>) -> Range<u64> {
        self.chunk(spans.start).member.start..self.chunk(spans.end - 1).member.end
    }

    fn decoder(&self, spans: Range<u32>, room: Room) -> Result<Box<dyn DecodeSpans>, IndexError> {
        let compression = match self.table.codec() {
            ChunkCodec::Gzip => Compression::Gzip,
            ChunkCodec::Zstd => Compression::Zstd,
        };
        let first = SpanId(spans.start);
        let none = || IndexError::NoSuchSpans {
            first,
            last: SpanId(spans.end.saturating_sub(1)),
            len: self.table.chunks().len(),
        };
        let chunks = self.table.chunks().get(spans.start as usize..spans.end as usize);
        let chunks = chunks.filter(|chunks| !chunks.is_empty()).ok_or_else(none)?;
        if self.restart_for(spans.start) != spans.start {
            return Err(IndexError::NotARestart { span: first });
        }
        let mut rest = Vec::from(chunks).into_iter();
        Ok(Box::new(ChunkDecoder {
            codec: MemberDecoder::new(compression, room)?,
            offset: chunks[0].member.start,
            member: 0..0,
            wanted: Undelivered {
                span: spans.start,
                current: rest.next(),
                rest,
                bytes: Vec::new(),
                made: 0,
                left: chunks.len(),
            },
        }))
    }

    fn of_tar(&self, _: Range<u64>) -> Vec<Range<u64>> {
        Vec::new()
    }

    fn recommended(&self) -> u64 {
        self.table.first()
    }
}

/// Decodes a run of chunks and verifies each.
struct ChunkDecoder {
    codec: MemberDecoder,
    /// Offset in the blob of the next byte of input.
    offset: u64,
    /// The member that is being decoded; empty before the first one.
    member: Range<u64>,
    wanted: Undelivered,
}

/// The chunks that a decoder has not delivered yet.
struct Undelivered {
    /// Number of the span that `current` is.
    span: u32,
    current: Option<Chunk>,
    rest: vec::IntoIter<Chunk>,
    /// The bytes of the current chunk so far.
    bytes: Vec<u8>,
    /// Bytes so far of the output of the member that is being decoded.
    made: u64,
    /// Number of chunks not yet delivered, also after an error.
    left: usize,
}

impl fmt::Debug for ChunkDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkDecoder")
            .field("span", &self.wanted.span)
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

impl DecodeSpans for ChunkDecoder {
    fn push(&mut self, compressed: &[u8], sink: &mut dyn FnMut(u32, &[u8])) -> Result<(), IndexError> {
        self.decode(compressed, sink)
            .inspect_err(|_| self.wanted.current = None)
    }

    fn is_done(&self) -> bool {
        self.wanted.left == 0
    }
}

impl ChunkDecoder {
    fn decode(&mut self, mut input: &[u8], sink: &mut dyn FnMut(u32, &[u8])) -> Result<(), IndexError> {
        while let Some(chunk) = &self.wanted.current {
            if self.member != chunk.member {
                let ahead = chunk.member.start - self.offset;
                let skipped = first_of(input, ahead).len();
                self.offset += skipped as u64;
                input = &input[skipped..];
                if self.offset < chunk.member.start {
                    return Ok(());
                }
                self.codec.seek(self.offset)?;
                (self.member, self.wanted.made) = (chunk.member.clone(), 0);
            }
            let of_member = first_of(input, self.member.end - self.offset);
            let mut unread = of_member;
            let output = self.codec.decode(&mut unread)?;
            let taken = of_member.len() - unread.len();
            self.offset += taken as u64;
            input = &input[taken..];
            match output {
                Some(output) => self.wanted.take(&self.member, output, sink)?,
                // The member is over and has too few bytes.
                None if self.offset == self.member.end => return Err(IndexError::Truncated { offset: self.offset }),
                None => return Ok(()),
            }
        }
        Ok(())
    }
}

impl Undelivered {
    /// Takes output of `member`. Delivers the chunks that it completes. Output behind the last chunk of the member is
    /// left out.
    fn take(
        &mut self,
        member: &Range<u64>,
        mut output: &[u8],
        sink: &mut dyn FnMut(u32, &[u8]),
    ) -> Result<(), IndexError> {
        while let Some(chunk) = &self.current
            && chunk.member == *member
            && !output.is_empty()
        {
            let before = first_of(output, chunk.inner.saturating_sub(self.made));
            self.made += before.len() as u64;
            output = &output[before.len()..];
            let missing = chunk.len as usize - self.bytes.len();
            let (head, tail) = output.split_at(output.len().min(missing));
            self.bytes.extend_from_slice(head);
            self.made += head.len() as u64;
            output = tail;
            if head.len() < missing {
                continue;
            }
            if Sha256::digest(&self.bytes)[..] != chunk.digest {
                return Err(IndexError::ChunkCorrupt {
                    span: SpanId(self.span),
                    device: chunk.range(),
                });
            }
            sink(self.span, &self.bytes);
            self.bytes.clear();
            self.left -= 1;
            self.span += 1;
            self.current = self.rest.next();
        }
        Ok(())
    }
}

/// Returns the first `most` bytes of `bytes`, or all if there are fewer.
fn first_of(bytes: &[u8], most: u64) -> &[u8] {
    &bytes[..usize::try_from(most).map_or(bytes.len(), |most| most.min(bytes.len()))]
}
