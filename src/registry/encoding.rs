//! `Content-Encoding` of responses (RFC 9110 §8.4).
//!
//! Every request asks for `identity`. Servers and proxies send the header all the same. Some have compressed the
//! body. Others describe the file with it: they label a gzip layer `gzip` but send it unchanged. The header alone
//! does not tell these cases apart, so the reader compares lengths and digests.

use std::io::{self, Read as _, Write as _};

use bytes::Bytes;
use flate2::read::{DeflateDecoder as DeflateReader, MultiGzDecoder as MultiGzReader, ZlibDecoder as ZlibReader};
use flate2::write::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use reqwest::header::{CONTENT_ENCODING, HeaderMap};

use crate::oci::Digest;

/// Most of the input that is decoded at a time.
const PIECE: usize = 16 << 10;
/// Largest zstd window, as a power of two: what RFC 9659 allows for this header.
const ZSTD_WINDOW: u32 = 23;

/// What an answer's header says of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// The bytes are sent as they are.
    Identity,
    /// Compressed in a way that can be undone.
    Compressed(Coding),
    /// Something else.
    Unknown,
}

/// A way of compressing that can be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// `gzip`, `x-gzip`
    Gzip,
    /// `deflate`: zlib, or bare DEFLATE as some servers have it
    Deflate,
    /// `zstd`
    Zstd,
    /// `br`
    Brotli,
}

impl Encoding {
    /// What the headers of an answer say.
    pub fn of(headers: &HeaderMap) -> Self {
        let values = headers.get_all(CONTENT_ENCODING).iter();
        let names = values.flat_map(|value| value.to_str().unwrap_or("?").split(','));
        let mut found = Self::Identity;
        for name in names {
            let coding = match name.trim().to_ascii_lowercase().as_str() {
                // Uploads to S3 leave `aws-chunked` behind, which is about the upload only.
                "" | "identity" | "aws-chunked" | "none" | "binary" => continue,
                "gzip" | "x-gzip" => Self::Compressed(Coding::Gzip),
                "deflate" => Self::Compressed(Coding::Deflate),
                "zstd" => Self::Compressed(Coding::Zstd),
                "br" => Self::Compressed(Coding::Brotli),
                _ => Self::Unknown,
            };
            found = match found {
                Self::Identity => coding,
                // Several, one over the other.
                _ => Self::Unknown,
            };
        }
        found
    }
}

impl Coding {
    /// Bytes from which [`first_bytes`] can tell what is inside: zstd gives nothing before a whole block of 128 KiB is there.
    pub(super) fn head(self) -> usize {
        match self {
            Self::Gzip | Self::Deflate | Self::Brotli => 1 << 10,
            Self::Zstd => 130 << 10,
        }
    }
}

/// Undoes a compression piece by piece. However much a piece expands to, no more than a block of it is held at a time.
pub(super) enum Decoder {
    Gzip(MultiGzDecoder<Vec<u8>>),
    /// Which of its two forms it is, the first byte tells.
    Deflate,
    Zlib(ZlibDecoder<Vec<u8>>),
    Bare(DeflateDecoder<Vec<u8>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Vec<u8>>>),
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder(..)")
    }
}

impl Decoder {
    pub(super) fn new(coding: Coding) -> io::Result<Self> {
        Ok(match coding {
            Coding::Gzip => Self::Gzip(MultiGzDecoder::new(Vec::new())),
            Coding::Deflate => Self::Deflate,
            Coding::Zstd => {
                let mut decoder = zstd::stream::write::Decoder::new(Vec::new())?;
                decoder.window_log_max(ZSTD_WINDOW)?;
                Self::Zstd(Box::new(decoder))
            }
            // A few bytes of it make gigabytes at once. Only documents, of which little is taken, come like that.
            Coding::Brotli => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// Takes some of `input`, which is not empty, and gives what that makes, which may be nothing yet.
    pub(super) fn push(&mut self, input: &mut Bytes) -> io::Result<Bytes> {
        if let (Self::Deflate, Some(&first)) = (&*self, input.first()) {
            *self = match is_zlib(first) {
                true => Self::Zlib(ZlibDecoder::new(Vec::new())),
                false => Self::Bare(DeflateDecoder::new(Vec::new())),
            };
        }
        let piece = &input[..input.len().min(PIECE)];
        let taken = match self {
            Self::Gzip(decoder) => decoder.write(piece)?,
            Self::Zlib(decoder) => decoder.write(piece)?,
            Self::Bare(decoder) => decoder.write(piece)?,
            Self::Zstd(decoder) => decoder.write(piece)?,
            Self::Deflate => 0,
        };
        let made = self.take();
        if taken == 0 && made.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "bytes behind the compressed ones",
            ));
        }
        let _ = input.split_to(taken);
        Ok(made)
    }

    /// What is left when all input was pushed.
    pub(super) fn finish(&mut self) -> io::Result<Bytes> {
        match self {
            Self::Gzip(decoder) => decoder.try_finish()?,
            Self::Zlib(decoder) => decoder.try_finish()?,
            Self::Bare(decoder) => decoder.try_finish()?,
            Self::Zstd(decoder) => decoder.flush()?,
            Self::Deflate => {}
        }
        Ok(self.take())
    }

    fn take(&mut self) -> Bytes {
        let made = match self {
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zlib(decoder) => decoder.get_mut(),
            Self::Bare(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.get_mut(),
            Self::Deflate => return Bytes::new(),
        };
        std::mem::take(made).into()
    }
}

/// The decompressed bytes, if they are that and no more than `cap`.
pub fn decode(coding: Coding, mut bytes: Bytes, cap: usize) -> Option<Bytes> {
    if coding == Coding::Brotli {
        let mut decoded = Vec::new();
        let most = u64::try_from(cap).ok()?.saturating_add(1);
        brotli(&bytes).take(most).read_to_end(&mut decoded).ok()?;
        return (decoded.len() <= cap).then(|| decoded.into());
    }
    let mut decoder = Decoder::new(coding).ok()?;
    let mut decoded = Vec::new();
    loop {
        let (made, last) = match bytes.is_empty() {
            false => (decoder.push(&mut bytes).ok()?, false),
            true => (decoder.finish().ok()?, true),
        };
        if decoded.len() + made.len() > cap {
            return None;
        }
        decoded.extend_from_slice(&made);
        if last {
            return Some(decoded.into());
        }
    }
}

/// A document without the compression that its answer states. Some servers label what they have not compressed, so bytes
/// that have the digest as they are stay as they are, and so does a JSON text.
pub fn plain(bytes: Bytes, encoding: Encoding, expected: Option<&Digest>, cap: usize) -> Bytes {
    let Encoding::Compressed(coding) = encoding else {
        return bytes;
    };
    let good = match expected {
        Some(expected) => expected.verify(&bytes).is_ok(),
        None => bytes.trim_ascii_start().starts_with(b"{"),
    };
    match good {
        true => bytes,
        // What cannot be decoded fails its check, or is no document.
        false => decode(coding, bytes.clone(), cap).unwrap_or(bytes),
    }
}

/// The first four bytes that the beginning of compressed data unpacks to, or as many as there are; `None` if it is not
/// compressed like that.
pub(super) fn first_bytes(coding: Coding, head: &[u8]) -> Option<Vec<u8>> {
    let mut first = vec![0; 4];
    let read = match coding {
        Coding::Gzip => MultiGzReader::new(head).read(&mut first),
        Coding::Deflate => match is_zlib(*head.first()?) {
            true => ZlibReader::new(head).read(&mut first),
            false => DeflateReader::new(head).read(&mut first),
        },
        Coding::Zstd => zstd::stream::read::Decoder::new(head).ok()?.read(&mut first),
        Coding::Brotli => brotli(head).read(&mut first),
    };
    first.truncate(read.ok()?);
    Some(first)
}

fn brotli(bytes: &[u8]) -> brotli_decompressor::Decompressor<&[u8]> {
    brotli_decompressor::Decompressor::new(bytes, PIECE)
}

/// Whether a `deflate` body has the frame of zlib. RFC 1950: the low four bits of its first byte are 8, and no more than 7 is
/// above them.
fn is_zlib(first: u8) -> bool {
    first & 0x8f == 8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[&str]) -> Encoding {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(CONTENT_ENCODING, value.parse().unwrap());
        }
        Encoding::of(&headers)
    }

    fn compressed(coding: Option<Coding>, bytes: &[u8]) -> Bytes {
        let level = flate2::Compression::default();
        let mut made = Vec::new();
        match coding {
            Some(Coding::Gzip) => flate2::write::GzEncoder::new(&mut made, level).write_all(bytes),
            Some(Coding::Deflate) => flate2::write::ZlibEncoder::new(&mut made, level).write_all(bytes),
            Some(Coding::Zstd) => {
                made = zstd::encode_all(bytes, 3).unwrap();
                Ok(())
            }
            Some(Coding::Brotli) => unreachable!("nothing here writes it"),
            None => flate2::write::DeflateEncoder::new(&mut made, level).write_all(bytes),
        }
        .unwrap();
        made.into()
    }

    #[test]
    fn headers() {
        let gzip = Encoding::Compressed(Coding::Gzip);
        assert_eq!(of(&[]), Encoding::Identity);
        assert_eq!(of(&["identity"]), Encoding::Identity);
        assert_eq!(of(&["aws-chunked"]), Encoding::Identity);
        assert_eq!(of(&["gzip"]), gzip);
        assert_eq!(of(&["X-GZIP"]), gzip);
        assert_eq!(of(&["aws-chunked,gzip"]), gzip);
        assert_eq!(of(&["aws-chunked", " gzip "]), gzip);
        assert_eq!(of(&["br"]), Encoding::Compressed(Coding::Brotli));
        assert_eq!(of(&["compress"]), Encoding::Unknown);
        assert_eq!(of(&["gzip, gzip"]), Encoding::Unknown);
    }

    #[test]
    fn every_coding_is_undone_up_to_the_cap() {
        let bytes: Vec<u8> = (0..300_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        for (coding, form) in [
            (Coding::Gzip, Some(Coding::Gzip)),
            (Coding::Deflate, Some(Coding::Deflate)),
            (Coding::Deflate, None),
            (Coding::Zstd, Some(Coding::Zstd)),
        ] {
            let packed = compressed(form, &bytes);
            assert!(packed.len() < bytes.len());
            assert_eq!(
                decode(coding, packed.clone(), bytes.len()).as_deref(),
                Some(&bytes[..]),
                "{coding:?}"
            );
            assert_eq!(decode(coding, packed.clone(), bytes.len() - 1), None, "{coding:?}");
            assert_eq!(
                decode(coding, Bytes::from(bytes.clone()), usize::MAX),
                None,
                "{coding:?}"
            );
            assert_eq!(
                first_bytes(coding, &packed[..packed.len().min(coding.head())]).as_deref(),
                Some(&bytes[..4]),
                "{coding:?}"
            );
            assert_eq!(first_bytes(coding, &bytes), None, "{coding:?}");
            // What one step makes is small, however much there is to come.
            let mut decoder = Decoder::new(coding).unwrap();
            let zeros = vec![0; 64 << 20];
            let mut packed = compressed(form, &zeros);
            while !packed.is_empty() {
                assert!(decoder.push(&mut packed).unwrap().len() <= 256 << 10, "{coding:?}");
            }
            assert!(decoder.finish().unwrap().len() <= 256 << 10, "{coding:?}");
        }
    }

    #[test]
    fn brotli_documents_are_decoded() {
        // As the library of Node.js writes it.
        let packed = Bytes::from_static(b"\x1b\xe4\x00\x40\x8c\xd3\x15\xf7\x21\x9d\xac\x62\x84\x4a\x4f\x11\x99\xbd\x66\xd1\x09\xeb\x03\x0e\x39\x60\xbd\x1c\xa4\x25\x14\x99\x56\x0c\x4c\x3a\x38\x9f\x6e\xba\x55\x63\x68\x78\x40\x62");
        let text = format!(r#"{{"schemaVersion":2,"text":"{}"}}"#, "a".repeat(200));
        let decoded = decode(Coding::Brotli, packed.clone(), text.len());
        assert_eq!(decoded.as_deref(), Some(text.as_bytes()));
        assert_eq!(decode(Coding::Brotli, packed, text.len() - 1), None);
        assert_eq!(decode(Coding::Brotli, text.into(), usize::MAX), None);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for coding in [Coding::Gzip, Coding::Deflate, Coding::Zstd, Coding::Brotli] {
                let _ = decode(coding, bytes.clone().into(), 1 << 20);
            }
        }
    }
}
