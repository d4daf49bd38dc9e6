//! Finds which bytes of a blob a response holds, judged by its headers as far as they make sense.
//!
//! The table is for responses with status 206, and for those with status 200 that look like a part. `blob.rs` decides by
//! the status which responses those are.
//!
//! | response to a request for a range | taken as |
//! |---|---|
//! | a `Content-Range` that fits the length and contains the start of the range | what it says, cut to the range |
//! | a `Content-Range` that fits the length and names other bytes, or begins more than 1 MiB before the range | wrong |
//! | no `Content-Range` or one that contradicts the length, and as many bytes as requested | the requested range |
//! | no `Content-Range`, and as many bytes as the blob has | the whole blob |
//! | no `Content-Range`, and fewer bytes than requested or an unknown number | the beginning of the range |
//! | `multipart/byteranges` | its first part, judged by that part's headers |
//! | any other | wrong |
//!
//! Only the first row *proves* that the bytes are the requested ones. It proves it only if the total is right and the
//! response names no encoding. The reader has to check all other bytes. If they were wrong, the reader says so
//! through [`BlobSource::judged`].
//!
//! [`BlobSource::judged`]: crate::blob::BlobSource::judged

use std::ops::Range;

use bytes::{Buf as _, Bytes, BytesMut};
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE};

use crate::blob::BlobError;
use crate::registry::content_range::ContentRange;
use crate::registry::encoding::{BodyDecoder, Coding, Encoding, first_bytes};
use crate::registry::transport::Reply;

/// Most bytes to receive and discard in order to reach an offset: about as many as arrive in a round trip. A larger
/// value wastes bandwidth. With a smaller one, more reads fail on servers without ranges.
pub(super) const MAX_SKIP: u64 = 1 << 20;
/// Longest head of a part in a multipart response, in bytes. Real heads have two headers.
const MAX_PART_HEAD: usize = 8 << 10;

/// Where the bytes of a response lie in the blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BodyPlace {
    /// The response holds `skip` unwanted bytes, then `take` requested ones. `proven` is whether its headers prove
    /// the place.
    Part { skip: u64, take: u64, proven: bool },
    /// The response holds the whole blob.
    Whole,
    /// The response holds other bytes than the requested ones.
    Elsewhere,
}

/// Finds where the bytes of a response lie in the blob. The response belongs to a request for `wanted` of a blob of
/// `size` bytes. `label` is its `Content-Range`. `length` is the number of its bytes, if stated.
pub(super) fn place(label: Option<ContentRange>, length: Option<u64>, wanted: &Range<u64>, size: u64) -> BodyPlace {
    let asked = wanted.end - wanted.start;
    let unproven = |take| BodyPlace::Part {
        skip: 0,
        take,
        proven: false,
    };
    match (label, length) {
        (Some(ContentRange::Part { range, total }), length)
            if length.is_none_or(|length| length == range.end - range.start) =>
        {
            let skip = wanted.start.checked_sub(range.start).filter(|skip| *skip <= MAX_SKIP);
            match skip {
                Some(skip) if range.end > wanted.start => BodyPlace::Part {
                    skip,
                    take: range.end.min(wanted.end) - wanted.start,
                    proven: total.is_none_or(|total| total == size),
                },
                _ => BodyPlace::Elsewhere,
            }
        }
        (_, Some(length)) if length == asked => unproven(asked),
        (Some(_), _) => BodyPlace::Elsewhere,
        (None, Some(length)) if length == size => BodyPlace::Whole,
        (None, Some(length)) if length > asked || length == 0 => BodyPlace::Elsewhere,
        (None, length) => unproven(length.unwrap_or(asked)),
    }
}

/// The body of a response. A look at its beginning does not consume it.
#[derive(Debug)]
pub(super) struct ResponseContent {
    reply: Reply,
    /// Bytes received and not yet given out.
    ready: Bytes,
    /// Decompresses the received bytes, if they are to be decompressed.
    decoder: Option<BodyDecoder>,
}

impl ResponseContent {
    pub(super) fn new(reply: Reply) -> Self {
        Self {
            reply,
            ready: Bytes::new(),
            decoder: None,
        }
    }

    pub(super) fn host(&self) -> String {
        self.reply.host()
    }

    /// Returns the next bytes, or `None` at the end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, BlobError> {
        loop {
            if self.ready.is_empty() {
                match self.reply.chunk().await? {
                    Some(chunk) if chunk.is_empty() => continue,
                    Some(chunk) => self.ready = chunk,
                    None => {
                        let Some(mut decoder) = self.decoder.take() else {
                            return Ok(None);
                        };
                        let last = decoder.finish().map_err(|error| self.broken(&error))?;
                        return Ok(Some(last).filter(|last| !last.is_empty()));
                    }
                }
            }
            let Some(decoder) = &mut self.decoder else {
                return Ok(Some(std::mem::take(&mut self.ready)));
            };
            let made = decoder.push(&mut self.ready).map_err(|error| self.broken(&error))?;
            if !made.is_empty() {
                return Ok(Some(made));
            }
        }
    }

    /// Receives bytes until `enough` accepts them, until there are `most` of them, or until the body ends. Returns
    /// the bytes without consuming them.
    async fn look(&mut self, most: usize, enough: impl Fn(&[u8]) -> bool) -> Result<&[u8], BlobError> {
        while self.ready.len() < most && !enough(&self.ready) {
            let Some(chunk) = self.reply.chunk().await? else { break };
            if self.ready.is_empty() {
                self.ready = chunk;
            } else {
                let mut joined = BytesMut::from(&self.ready[..]);
                joined.extend_from_slice(&chunk);
                self.ready = joined.freeze();
            }
        }
        Ok(&self.ready)
    }

    /// Skips the head of the first part of a multipart response. Returns the `Content-Range` of that part, if it is
    /// valid.
    pub(super) async fn enter_part(&mut self) -> Result<Option<ContentRange>, BlobError> {
        let boundary = self.reply.header(CONTENT_TYPE).and_then(boundary);
        let Some(boundary) = boundary else { return Ok(None) };
        let found = self
            .look(MAX_PART_HEAD, |bytes| part_head(bytes, &boundary).is_some())
            .await?;
        let Some((length, label)) = part_head(found, &boundary) else {
            return Ok(None);
        };
        self.ready.advance(length);
        Ok(label)
    }

    /// Whether the server compressed the bytes with `coding` for the transfer, as far as their beginning shows.
    /// `is_compressed` is whether the blob itself is compressed.
    pub(super) async fn looks_encoded(&mut self, coding: Coding, is_compressed: bool) -> Result<bool, BlobError> {
        let head = self.look(coding.head(), |_| false).await?;
        let inner = first_bytes(coding, head);
        Ok(match inner.as_deref() {
            // The bytes are not compressed with `coding`.
            None => false,
            // These are the magic numbers of gzip and zstd, which no tar begins with. The bytes inside are therefore
            // a compressed blob.
            Some([0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..]) => true,
            Some(_) => !is_compressed,
        })
    }

    /// Whether the bytes are decompressed.
    pub(super) fn is_decoded(&self) -> bool {
        self.decoder.is_some()
    }

    /// Decompresses all bytes from here on.
    pub(super) fn decode(&mut self, coding: Coding) -> Result<(), BlobError> {
        self.decoder = Some(BodyDecoder::new(coding).map_err(|error| self.broken(&error))?);
        Ok(())
    }

    fn broken(&self, error: &std::io::Error) -> BlobError {
        BlobError::Protocol {
            host: self.reply.host(),
            what: "a blob".to_owned(),
            detail: format!("its Content-Encoding cannot be undone: {error}"),
            transient: false,
        }
    }
}

/// Whether a response declares itself multipart.
pub(super) fn is_multipart(reply: &Reply) -> bool {
    reply.header(CONTENT_TYPE).is_some_and(|text| {
        text.trim_start()
            .to_ascii_lowercase()
            .starts_with("multipart/byteranges")
    })
}

/// Returns the `Content-Range` of a response, if it has a valid one.
pub(super) fn label(reply: &Reply) -> Option<ContentRange> {
    reply.header(CONTENT_RANGE).and_then(ContentRange::parse)
}

/// Returns the encoding that a response states.
pub(super) fn encoding(reply: &Reply) -> Encoding {
    Encoding::of(reply.headers())
}

fn boundary(content_type: &str) -> Option<String> {
    let (_, parameters) = content_type.split_once(';')?;
    let value = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("boundary").then_some(value)
    })?;
    let value = value.trim().trim_matches('"');
    // RFC 2046, section 5.1.1, limits the length.
    (1..=70).contains(&value.len()).then(|| value.to_owned())
}

/// Returns the length of everything before the content of the first part, and that part's `Content-Range`. Returns
/// `None` until the head has fully arrived.
fn part_head(bytes: &[u8], boundary: &str) -> Option<(usize, Option<ContentRange>)> {
    let delimiter = format!("--{boundary}");
    let start = find(bytes, delimiter.as_bytes())?;
    let end = start + find(&bytes[start..], b"\r\n\r\n")? + 4;
    let lines = bytes[start..end].split(|byte| *byte == b'\n').skip(1);
    let mut labels = lines.filter_map(|line| {
        let (name, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
        name.trim()
            .eq_ignore_ascii_case("content-range")
            .then(|| ContentRange::parse(value))
    });
    Some((end, labels.next().flatten()))
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn places() {
        // The request asks for 100..200 of 1000 bytes.
        let at = |label: &str, length: Option<u64>| place(ContentRange::parse(label), length, &(100..200), 1000);
        let part = |skip, take, proven| BodyPlace::Part { skip, take, proven };
        for (label, length, want) in [
            ("bytes 100-199/1000", Some(100), part(0, 100, true)),
            ("bytes 100-199/*", Some(100), part(0, 100, true)),
            ("bytes 100-199/1000", None, part(0, 100, true)),
            ("bytes 100-149/1000", Some(50), part(0, 50, true)),
            // Wider than requested, shifted, or with another total.
            ("bytes 0-299/1000", Some(300), part(100, 100, true)),
            ("bytes 0-149/1000", Some(150), part(100, 50, true)),
            ("bytes 0-999/1000", Some(1000), part(100, 100, true)),
            ("bytes 100-199/999", Some(100), part(0, 100, false)),
            // Other bytes.
            ("bytes 0-99/1000", Some(100), BodyPlace::Elsewhere),
            ("bytes 101-200/1000", Some(100), BodyPlace::Elsewhere),
            ("bytes 0-99/1000", None, BodyPlace::Elsewhere),
            // Labels that contradict the length, are invalid or are missing.
            ("bytes 100-200/1000", Some(100), part(0, 100, false)),
            ("bytes=100-199/1000", Some(100), part(0, 100, false)),
            ("", Some(100), part(0, 100, false)),
            ("", Some(40), part(0, 40, false)),
            ("", Some(1000), BodyPlace::Whole),
            ("", Some(101), BodyPlace::Elsewhere),
            ("", Some(0), BodyPlace::Elsewhere),
            ("", None, part(0, 100, false)),
            ("bytes 100-200/1000", Some(102), BodyPlace::Elsewhere),
            ("bytes */1000", Some(5), BodyPlace::Elsewhere),
        ] {
            assert_eq!(at(label, length), want, "{label} {length:?}");
        }
        let far = place(
            ContentRange::parse("bytes 0-9999999/*"),
            None,
            &(2 << 20..3 << 20),
            10_000_000,
        );
        assert_eq!(far, BodyPlace::Elsewhere, "too much to receive for nothing");
    }

    #[test]
    fn parts_of_multipart_answers() {
        let head = b"preamble\r\n--X y\r\nContent-Type: a/b\r\ncontent-range: bytes 5-9/20\r\n\r\n";
        let want = ContentRange::parse("bytes 5-9/20");
        let bytes = [&head[..], b"hello\r\n--X y--"].concat();
        assert_eq!(part_head(&bytes, "X y"), Some((head.len(), want)));
        assert_eq!(part_head(&bytes[..head.len() - 1], "X y"), None);
        assert_eq!(part_head(&bytes, "Z"), None);
        assert_eq!(part_head(b"--X\r\n\r\nhello", "X"), Some((7, None)));
        assert_eq!(boundary("multipart/byteranges; boundary=XX"), Some("XX".to_owned()));
        assert_eq!(
            boundary("multipart/byteranges; a=b; Boundary=\"x:y\""),
            Some("x:y".to_owned())
        );
        assert_eq!(boundary("multipart/byteranges"), None);
        assert_eq!(boundary("multipart/byteranges; boundary="), None);
    }

    proptest! {
        #[test]
        fn what_is_taken_lies_in_the_range(
            label in prop_oneof![Just(String::new()), "bytes [0-9]{1,4}-[0-9]{1,4}/([0-9]{1,4}|\\*)"],
            length in proptest::option::of(0u64..2000),
            start in 0u64..900,
            asked in 1u64..100,
        ) {
            let wanted = start..start + asked;
            if let BodyPlace::Part { take, skip, .. } = place(ContentRange::parse(&label), length, &wanted, 1000) {
                prop_assert!((1..=asked).contains(&take));
                prop_assert!(skip <= MAX_SKIP);
                prop_assert!(length.is_none_or(|length| skip + take <= length));
            }
        }

        #[test]
        fn part_heads_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), boundary in "[ -~]{1,8}") {
            let _ = part_head(&bytes, &boundary);
        }
    }
}
