//! The last bytes of a gzip blob, which say where an eStargz table begins.
//!
//! A footer is an empty gzip member whose extra field has the offset:
//!
//! ```text
//!  0  1f 8b 08 04, 00 00 00 00, 00, ff    a gzip header with an extra field
//! 10  1a 00                               length of the extra field: 26
//! 12  "SG", 16 00                         subfield of 22 bytes
//! 16  16 hex digits                       offset of the table in the blob
//! 32  "STARGZ"
//! 38  01 00 00 ff ff, eight zeros         an empty block, then checksum and length of nothing
//! ```
//! Older blobs have a footer without the subfield header. Others have a footer that says that the table is in another
//! blob. Neither kind has a table that can be used.

use super::CarriedError;

/// Bytes of the footer.
const FOOTER: usize = 51;
/// Bytes of the footer of legacy stargz, and of a blob whose table is elsewhere.
const LEGACY: usize = 47;
const EXTERNAL: usize = 46;

const MAGIC: &[u8] = b"STARGZ";
const BEFORE_EXTRA: [u8; 10] = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff];
const EMPTY: [u8; 13] = [1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];

/// What the footer of an eStargz blob says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Offset of the table in the blob.
    pub table: u64,
}

impl Footer {
    /// Bytes that a footer takes at the end of a blob.
    pub const SIZE: u64 = FOOTER as u64;

    /// Reads the footer from the last bytes of a blob, of which there may be more than the footer has.
    pub fn parse(tail: &[u8]) -> Result<Self, CarriedError> {
        let unusable = |reason| CarriedError::Unusable { reason };
        if let Some(extra) = extra(tail, EXTERNAL)
            && extra.ends_with(b"STARGZEXTERNALTOC")
        {
            return Err(unusable("it is in another blob"));
        }
        if let Some(extra) = extra(tail, LEGACY)
            && extra.ends_with(MAGIC)
        {
            return Err(unusable("the blob has the footer of a legacy format"));
        }
        let extra = extra(tail, FOOTER).ok_or_else(|| unusable("the blob has no footer"))?;
        let digits = extra
            .strip_prefix(b"SG\x16\0")
            .and_then(|field| field.strip_suffix(MAGIC))
            .ok_or_else(|| unusable("the blob has no footer"))?;
        let table = hex(digits).ok_or_else(|| unusable("the footer has no offset"))?;
        Ok(Self { table })
    }
}

/// Returns the extra field of an empty gzip member of `size` bytes, if `tail` ends with such a member.
fn extra(tail: &[u8], size: usize) -> Option<&[u8]> {
    let footer = &tail[tail.len().checked_sub(size)?..];
    let field = footer.strip_prefix(&BEFORE_EXTRA)?.strip_suffix(&EMPTY)?;
    let (length, field) = field.split_first_chunk()?;
    (usize::from(u16::from_le_bytes(*length)) == field.len()).then_some(field)
}

/// Returns the number of some hex digits. Nothing but digits is accepted.
fn hex(digits: &[u8]) -> Option<u64> {
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(extra: &[u8]) -> Vec<u8> {
        let length = (extra.len() as u16).to_le_bytes();
        [&b"what is before"[..], &BEFORE_EXTRA, &length, extra, &EMPTY].concat()
    }

    fn reason(tail: &[u8]) -> &'static str {
        match Footer::parse(tail) {
            Err(CarriedError::Unusable { reason }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_footer_says_where_the_table_is() {
        let tail = footer(b"SG\x16\x0000000000000000f0STARGZ");
        assert_eq!(Footer::parse(&tail), Ok(Footer { table: 240 }));
        assert_eq!(Footer::parse(&tail[tail.len() - 51..]), Ok(Footer { table: 240 }));
        assert_eq!(reason(&tail[tail.len() - 50..]), "the blob has no footer");
        assert_eq!(reason(&[&tail[..], b"\0"].concat()), "the blob has no footer");
    }

    #[test]
    fn other_footers_are_told_apart() {
        assert!(reason(&footer(b"00000000000000f0STARGZ")).contains("legacy"));
        assert!(reason(&footer(b"SG\x11\0STARGZEXTERNALTOC")).contains("another blob"));
        assert_eq!(
            reason(&footer(b"SG\x16\x00000000000000+0f0STARGZ")),
            "the footer has no offset"
        );
        assert_eq!(
            reason(&footer(b"SX\x16\x0000000000000000f0STARGZ")),
            "the blob has no footer"
        );
        assert_eq!(reason(b""), "the blob has no footer");
    }
}
