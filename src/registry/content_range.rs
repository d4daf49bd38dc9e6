//! `Content-Range` of responses to requests for a single byte range (RFC 9110 §14.4): a pure parser.

use std::ops::Range;

/// What a `Content-Range` header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContentRange {
    /// The body is a part of the representation.
    Part {
        /// The bytes in the body, half-open and never empty.
        range: Range<u64>,
        /// Size of the whole, unless the server wrote `*`.
        total: Option<u64>,
    },
    /// `bytes */total`, sent with status 416.
    Unsatisfied {
        /// Size of the whole.
        total: u64,
    },
}

impl ContentRange {
    /// Parses a header value. Returns `None` if it breaks the grammar.
    pub fn parse(header: &str) -> Option<Self> {
        let header = header.trim();
        let (unit, rest) = header.split_at_checked(5)?;
        if !unit.eq_ignore_ascii_case("bytes") || !rest.starts_with([' ', '\t']) {
            return None;
        }
        let (part, total) = rest.trim().split_once('/')?;
        let total = match total {
            "*" => None,
            digits => Some(number(digits)?),
        };
        if part == "*" {
            return Some(Self::Unsatisfied { total: total? });
        }
        let (first, last) = part.split_once('-')?;
        let (first, last) = (number(first)?, number(last)?);
        let end = last.checked_add(1)?;
        if first > last || total.is_some_and(|total| end > total) {
            return None;
        }
        Some(Self::Part {
            range: first..end,
            total,
        })
    }
}

/// Parses a number of digits only, because `u64::from_str` would accept a sign.
fn number(text: &str) -> Option<u64> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn malformed_headers_are_refused() {
        for header in [
            "",
            "bytes",
            "bytes ",
            "bytes 0-1",
            "bytes 5-4/10",
            "bytes 0-10/10",
            "bytes -1/10",
            "bytes +0-1/10",
            "bytes 0-18446744073709551615/*",
            "bytes */*",
            "chars 0-1/2",
            "bytes0-1/2",
            "byte\u{e9} 0-1/2",
        ] {
            assert_eq!(ContentRange::parse(header), None, "{header}");
        }
        assert_eq!(
            ContentRange::parse("bytes */7"),
            Some(ContentRange::Unsatisfied { total: 7 })
        );
    }

    proptest! {
        #[test]
        fn never_panics(header in ".{0,60}") {
            let _ = ContentRange::parse(&header);
        }

        #[test]
        fn round_trip(first in 0u64..1 << 50, len in 1u64..1 << 40, more in 0u64..1 << 40) {
            let end = first + len;
            let total = end + more;
            prop_assert_eq!(
                ContentRange::parse(&format!("bytes {first}-{}/{total}", end - 1)),
                Some(ContentRange::Part { range: first..end, total: Some(total) })
            );
        }
    }
}
