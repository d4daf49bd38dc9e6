//! Faults by name, for the command line and for control files.
//!
//! A rule is `[TIMES] PART FAULT`. The next `TIMES` requests whose path and query contain `PART` get the fault;
//! without `TIMES`, all of them. Examples are `2 /blobs/ status=503` and `/manifests/ header=Content-Encoding: gzip`.

use std::str::FromStr;
use std::time::Duration;

use super::Fault;

/// Names of all faults, for help texts.
pub const NAMES: &str = "\
status=CODE             this status and no body
ignore-range            the whole blob with 200
wide=BYTES              to a range, all blocks of that size that it touches
other-bytes             to a range, wrong bytes labelled as the right ones
whole-as-part           to a range, the whole blob labelled as the range
part-as-whole           to a range, what was asked for with status 200
multipart               to a range, a multipart/byteranges answer
compress=CODING         the body compressed with gzip, deflate or zstd, and labelled so
content-range=TEXT      this Content-Range on a 206; none if it is empty
header=NAME: VALUE      this header added
short=BYTES             to a range, no more than that many bytes, correctly labelled
truncate=BYTES          the connection closed after that many bytes of the body
stall=BYTES             nothing more after that many bytes, the connection left open
silence                 no answer, the connection left open
hangup                  the connection closed instead of an answer
corrupt=OFFSET          the byte at this offset of the body flipped
slow=BYTES/MILLISECONDS the body in pieces of that size with that pause before each
no-length               no Content-Length; the body ends with the connection
chunked                 no Content-Length; the body comes in chunks
ranges:FAULT            that fault, if a range was asked for";

/// A fault and the requests that get it.
#[derive(Debug, Clone)]
pub struct Rule {
    pub times: usize,
    pub part: String,
    pub fault: Fault,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let word = |text: &str| {
            let (word, rest) = text.trim_start().split_once(char::is_whitespace)?;
            Some((word.to_owned(), rest.to_owned()))
        };
        let missing = || format!("`{text}` is not a rule: want [TIMES] PART FAULT");
        let (first, rest) = word(text).ok_or_else(missing)?;
        let (times, part, rest) = match first.parse() {
            Ok(times) => {
                let (part, rest) = word(&rest).ok_or_else(missing)?;
                (times, part, rest)
            }
            Err(_) => (usize::MAX, first, rest),
        };
        Ok(Self {
            times,
            part,
            fault: rest.trim().parse()?,
        })
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(fault) = text.strip_prefix("ranges:") {
            return Ok(Self::OnRanges(Box::new(fault.parse()?)));
        }
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        let number = || {
            let number = value.parse::<usize>();
            number.map_err(|_| format!("`{name}` wants a number, not `{value}`"))
        };
        Ok(match name {
            "status" => Self::status(value.parse().map_err(|_| format!("`{value}` is no status"))?),
            "ignore-range" => Self::IgnoreRange,
            "wide" => Self::Wide(number()?.max(1)),
            "other-bytes" => Self::OtherBytes,
            "whole-as-part" => Self::WholeAsPart,
            "part-as-whole" => Self::PartAsWhole,
            "multipart" => Self::Multipart,
            "compress" => match value {
                "gzip" => Self::Compress("gzip"),
                "deflate" => Self::Compress("deflate"),
                "zstd" => Self::Compress("zstd"),
                other => return Err(format!("no coding called `{other}`")),
            },
            "content-range" => Self::ContentRange(value.to_owned()),
            "header" => match value.split_once(':') {
                Some((name, value)) => Self::Header(name.trim().to_owned(), value.trim().to_owned()),
                None => return Err("`header` wants NAME: VALUE".to_owned()),
            },
            "short" => Self::Short(number()?),
            "truncate" => Self::Truncate(number()?),
            "stall" => Self::Stall(number()?),
            "silence" => Self::Silence,
            "hangup" => Self::Hangup,
            "corrupt" => Self::Corrupt(number()?),
            "slow" => match value.split_once('/').map(|(size, pause)| (size.parse(), pause.parse())) {
                Some((Ok(size), Ok(pause))) if size > 0 => Self::Slow(size, Duration::from_millis(pause)),
                _ => return Err("`slow` wants BYTES/MILLISECONDS".to_owned()),
            },
            "no-length" => Self::NoLength,
            "chunked" => Self::Chunked,
            other => return Err(format!("no fault called `{other}`")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_in_the_help_is_a_fault() {
        for line in NAMES.lines() {
            let form = line.split_whitespace().next().unwrap();
            let (name, value) = form.split_once('=').unwrap_or((form, ""));
            let value = match (name, value) {
                (_, "") => "",
                ("header", _) => "=A: b",
                ("compress", _) => "=gzip",
                (_, "BYTES/MILLISECONDS") => "=1/1",
                _ => "=503",
            };
            let fault = format!("{}{value}", name.replace("FAULT", "multipart")).parse::<Fault>();
            assert!(fault.is_ok(), "{line}: {fault:?}");
        }
    }

    #[test]
    fn rules() {
        let rule: Rule = "2 /blobs/ slow=1000/5".parse().unwrap();
        assert_eq!((rule.times, rule.part.as_str()), (2, "/blobs/"));
        assert!(matches!(rule.fault, Fault::Slow(1000, pause) if pause == Duration::from_millis(5)));
        let rule: Rule = "/manifests/ header=Content-Encoding: x gzip".parse().unwrap();
        assert_eq!(rule.times, usize::MAX);
        assert!(matches!(rule.fault, Fault::Header(name, value) if name == "Content-Encoding" && value == "x gzip"));
        for wrong in [
            "",
            "silence",
            "/blobs/ nonsense",
            "2 silence",
            "/x short=many",
            "/x slow=5",
            "/x compress=br",
        ] {
            assert!(wrong.parse::<Rule>().is_err(), "{wrong}");
        }
    }
}
