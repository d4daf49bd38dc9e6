//! Faults of answers, and how they are applied.

use std::time::Duration;

use super::answers::State;
use super::wire::{Answer, Request};

/// A fault of an answer.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The server answers with this status.
    Status {
        code: u16,
        headers: Vec<(String, String)>,
        body: String,
    },
    /// The server sends the whole blob with 200 for any range.
    IgnoreRange,
    /// The server answers a range with all blocks of that size that the range touches, correctly labelled.
    Wide(usize),
    /// The server answers a range with other bytes, labelled as the requested ones.
    OtherBytes,
    /// The server answers a range with the whole blob, labelled as the range.
    WholeAsPart,
    /// The server answers a range with status 200 in place of 206.
    PartAsWhole,
    /// The server answers a range with a `multipart/byteranges` body of one part.
    Multipart,
    /// The server compresses the body (`gzip`, `deflate` or `zstd`) and labels it so.
    Compress(&'static str),
    /// A 206 has this `Content-Range`; none if the text is empty.
    ContentRange(String),
    /// The server adds this header.
    Header(String, String),
    /// A 206 has at most that many bytes, correctly labelled.
    Short(usize),
    /// The server closes the connection after that many bytes of the body.
    Truncate(usize),
    /// The server sends nothing more after that many bytes of the body and leaves the connection open.
    Stall(usize),
    /// The server sends no answer and leaves the connection open.
    Silence,
    /// The server closes the connection instead of an answer.
    Hangup,
    /// The server changes the byte at this offset of the body.
    Corrupt(usize),
    /// The server sends the body in pieces of that size, with that pause before each.
    Slow(usize, Duration),
    /// The body has no `Content-Length` and ends with the connection.
    NoLength,
    /// The body has no `Content-Length` and is sent in chunks.
    Chunked,
    /// The inner fault applies to requests for a range only.
    OnRanges(Box<Fault>),
}

impl Fault {
    /// A status without headers and body.
    pub fn status(code: u16) -> Self {
        Self::Status {
            code,
            headers: Vec::new(),
            body: String::new(),
        }
    }
}

pub(super) fn take_faults(state: &mut State, request: &Request) -> Vec<Fault> {
    let (target, is_range) = (&request.target, request.headers.contains_key("range"));
    let mut faults = Vec::new();
    for (part, times, fault) in &mut state.rules {
        // Rules with one kind of fault form a queue. A request gets at most one fault of each kind.
        let kind = std::mem::discriminant(fault);
        let queued = faults.iter().any(|taken| std::mem::discriminant(taken) == kind);
        if *times > 0 && !queued && target.contains(part.as_str()) {
            match fault {
                Fault::OnRanges(_) if !is_range => continue,
                Fault::OnRanges(fault) => faults.push(Fault::clone(fault)),
                fault => faults.push(fault.clone()),
            }
            *times -= 1;
        }
    }
    faults
}

/// Bytes that the server sends for a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ranging {
    Exact,
    Ignored,
    Wide(usize),
    Other,
    Whole,
}

impl Ranging {
    pub(super) fn of(faults: &[Fault]) -> Self {
        let found = faults.iter().find_map(|fault| match fault {
            Fault::IgnoreRange => Some(Self::Ignored),
            Fault::Wide(block) => Some(Self::Wide(*block)),
            Fault::OtherBytes => Some(Self::Other),
            Fault::WholeAsPart => Some(Self::Whole),
            _ => None,
        });
        found.unwrap_or(Self::Exact)
    }
}

fn compress(coding: &str, body: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let level = flate2::Compression::fast();
    let mut packed = Vec::new();
    match coding {
        "gzip" => flate2::write::GzEncoder::new(&mut packed, level)
            .write_all(body)
            .unwrap(),
        "deflate" => flate2::write::ZlibEncoder::new(&mut packed, level)
            .write_all(body)
            .unwrap(),
        "zstd" => packed = zstd::encode_all(body, 1).unwrap(),
        other => panic!("no coding called {other}"),
    }
    packed
}

/// How the server sends the bytes.
pub(super) struct Sending {
    pub(super) limit: usize,
    /// Whether to wait instead of closing after `limit` bytes.
    pub(super) hang: bool,
    pub(super) silence: bool,
    pub(super) hangup: bool,
    pub(super) pace: Option<(usize, Duration)>,
    pub(super) no_length: bool,
    pub(super) chunked: bool,
}

pub(super) fn distort(mut answer: Answer, faults: &[Fault]) -> (Answer, Sending) {
    let mut sending = Sending {
        limit: usize::MAX,
        hang: false,
        silence: false,
        hangup: false,
        pace: None,
        no_length: false,
        chunked: false,
    };
    for fault in faults {
        match fault.clone() {
            Fault::Status { code, headers, body } => {
                answer = Answer {
                    status: code,
                    headers,
                    body: body.into(),
                };
            }
            Fault::IgnoreRange | Fault::Wide(_) | Fault::OtherBytes | Fault::WholeAsPart => {}
            Fault::Multipart if answer.status == 206 => {
                let is_label = |header: &(String, String)| header.0 == "Content-Range";
                let label = answer.headers.iter().find(|header| is_label(header)).cloned();
                let label = label.map(|(name, value)| format!("{name}: {value}\r\n"));
                answer.headers.retain(|header| !is_label(header));
                let head = format!(
                    "\r\n--part\r\nContent-Type: application/octet-stream\r\n{}\r\n",
                    label.unwrap_or_default()
                );
                answer.body = [head.as_bytes(), &answer.body, b"\r\n--part--\r\n"].concat();
                answer = answer.header("Content-Type", "multipart/byteranges; boundary=part");
            }
            Fault::Multipart => {}
            Fault::PartAsWhole if answer.status == 206 => answer.status = 200,
            Fault::PartAsWhole => {}
            Fault::OnRanges(_) => unreachable!("unwrapped when it was taken"),
            Fault::Compress(coding) => {
                answer.body = compress(coding, &answer.body);
                answer = answer.header("Content-Encoding", coding);
            }
            Fault::ContentRange(value) => {
                answer.headers.retain(|(name, _)| name != "Content-Range");
                if !value.is_empty() {
                    answer = answer.header("Content-Range", value);
                }
            }
            Fault::Header(name, value) => answer = answer.header(&name, value),
            Fault::Short(count) if answer.body.len() > count && answer.status == 206 => {
                answer.body.truncate(count);
                for (_, value) in answer.headers.iter_mut().filter(|(name, _)| name == "Content-Range") {
                    let start: usize = value["bytes ".len()..].split('-').next().unwrap().parse().unwrap();
                    let total = value.split('/').next_back().unwrap();
                    *value = format!("bytes {start}-{}/{total}", start + count - 1);
                }
            }
            Fault::Short(_) => {}
            Fault::Truncate(count) => sending.limit = count,
            Fault::Stall(count) => (sending.limit, sending.hang) = (count, true),
            Fault::Silence => sending.silence = true,
            Fault::Hangup => sending.hangup = true,
            Fault::Corrupt(at) => {
                if let Some(byte) = answer.body.get_mut(at) {
                    *byte ^= 0xff;
                }
            }
            Fault::Slow(size, pause) => sending.pace = Some((size, pause)),
            Fault::NoLength => sending.no_length = true,
            Fault::Chunked => sending.chunked = true,
        }
    }
    (answer, sending)
}
