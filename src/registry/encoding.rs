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

/// Most input bytes decoded at a time, and the size of the brotli decoder's buffer.
const PIECE: usize = 16 << 10;
/// Largest zstd window, as a power of two (8 MiB): the limit of RFC 9659 for this header.
const ZSTD_WINDOW: u32 = 23;

/// What the headers of a response say about the encoding of its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// The body is sent unchanged.
    Identity,
    /// The body is compressed with a coding that the client can decode.
    Compressed(Coding),
    /// The body has an unknown encoding, or several.
    Unknown,
}

/// A compression that the client can decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// `gzip` or `x-gzip`.
    Gzip,
    /// `deflate`: zlib, or bare DEFLATE as some servers send it.
    Deflate,
    /// `zstd`
    Zstd,
    /// `br`
    Brotli,
}

impl Encoding {
    /// Reads the encoding from the headers of a response.
    pub fn of(headers: &HeaderMap) -> Self {
        let values = headers.get_all(CONTENT_ENCODING).iter();
        let names = values.flat_map(|value| value.to_str().unwrap_or("?").split(','));
        let mut found = Self::Identity;
        for name in names {
            let coding = match name.trim().to_ascii_lowercase().as_str() {
                // S3 keeps `aws-chunked` from the upload. It does not describe the response.
                "" | "identity" | "aws-chunked" | "none" | "binary" => continue,
                "gzip" | "x-gzip" => Self::Compressed(Coding::Gzip),
                "deflate" => Self::Compressed(Coding::Deflate),
                "zstd" => Self::Compressed(Coding::Zstd),
                "br" => Self::Compressed(Coding::Brotli),
                _ => Self::Unknown,
            };
            found = match found {
                Self::Identity => coding,
                // Several codings, one over the other.
                _ => Self::Unknown,
            };
        }
        found
    }
}

impl Coding {
    /// Returns how many bytes [`first_bytes`] needs to tell what is inside. zstd gives no output until a whole block
    /// of 128 KiB is there.
    pub(super) fn head(self) -> usize {
        match self {
            Self::Gzip | Self::Deflate | Self::Brotli => 1 << 10,
            Self::Zstd => 130 << 10,
        }
    }
}

/// Decompresses a body piece by piece. It holds at most one block of output at a time, however far a piece expands.
pub(super) enum BodyDecoder {
    Gzip(MultiGzDecoder<Vec<u8>>),
    /// A `deflate` body before its first byte, which tells zlib from bare DEFLATE.
    Deflate,
    Zlib(ZlibDecoder<Vec<u8>>),
    Bare(DeflateDecoder<Vec<u8>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Vec<u8>>>),
}

impl std::fmt::Debug for BodyDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BodyDecoder(..)")
    }
}

impl BodyDecoder {
    pub(super) fn new(coding: Coding) -> io::Result<Self> {
        Ok(match coding {
            Coding::Gzip => Self::Gzip(MultiGzDecoder::new(Vec::new())),
            Coding::Deflate => Self::Deflate,
            Coding::Zstd => {
                let mut decoder = zstd::stream::write::Decoder::new(Vec::new())?;
                decoder.window_log_max(ZSTD_WINDOW)?;
                Self::Zstd(Box::new(decoder))
            }
            // A few bytes of brotli can expand to gigabytes in one step. Only documents are decoded from brotli, with
            // a size cap.
            Coding::Brotli => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// Decodes some of `input`, which must not be empty, and removes it from `input`. Returns the decoded bytes,
    /// which may be none yet.
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

    /// Returns the remaining decoded bytes after all input was pushed.
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

/// Decompresses `bytes`. Returns `None` if they are not validly compressed, or expand to more than `cap` bytes.
pub fn decode(coding: Coding, mut bytes: Bytes, cap: usize) -> Option<Bytes> {
    if coding == Coding::Brotli {
        let mut decoded = Vec::new();
        let most = u64::try_from(cap).ok()?.saturating_add(1);
        brotli(&bytes).take(most).read_to_end(&mut decoded).ok()?;
        return (decoded.len() <= cap).then(|| decoded.into());
    }
    let mut decoder = BodyDecoder::new(coding).ok()?;
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

/// Undoes the compression of a document that its response states.
///
/// Some servers label documents that they have not compressed. Bytes that have the expected digest therefore stay
/// unchanged. Without an expected digest, a JSON text stays unchanged.
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
        // Bytes that cannot be decoded stay unchanged. They then fail the digest check or do not parse.
        false => decode(coding, bytes.clone(), cap).unwrap_or(bytes),
    }
}

/// Returns the first four decompressed bytes of `head`, or fewer if there are fewer. Returns `None` if `head` is not
/// compressed with `coding`.
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

/// Whether a `deflate` body has the frame of zlib. The low four bits of its first byte are 8, and the high four bits
/// are at most 7 (RFC 1950).
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
            // One step makes little output, however much is still to come.
            let mut decoder = BodyDecoder::new(coding).unwrap();
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
        // Written by the brotli library of Node.js.
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
