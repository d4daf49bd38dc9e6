//! What can go wrong with an answer, and making it so.

use std::time::Duration;

use super::answers::State;
use super::wire::{Answer, Request};

/// What goes wrong with an answer.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status instead of the answer.
    Status {
        code: u16,
        headers: Vec<(String, String)>,
        body: String,
    },
    /// The whole blob with 200, whatever was asked.
    IgnoreRange,
    /// To a range the bytes of all blocks of that size which it touches, correctly labelled.
    Wide(usize),
    /// To a range other bytes, labelled as those asked for.
    OtherBytes,
    /// To a range the whole blob, labelled as what was asked for.
    WholeAsPart,
    /// A 206 with status 200.
    PartAsWhole,
    /// A 206 as `multipart/byteranges` of one part.
    Multipart,
    /// The body compressed (`gzip`, `deflate` or `zstd`) and labelled so.
    Compress(&'static str),
    /// This `Content-Range` (none if empty) on a 206.
    ContentRange(String),
    /// This header added.
    Header(String, String),
    /// A 206 with at most that many bytes, correctly labelled.
    Short(usize),
    /// The connection closed after that many bytes of the body.
    Truncate(usize),
    /// Nothing more after that many bytes of the body, the connection left open.
    Stall(usize),
    /// No answer at all, the connection left open.
    Silence,
    /// The connection closed instead of an answer.
    Hangup,
    /// The byte at this offset of the body flipped.
    Corrupt(usize),
    /// The body in pieces of that size, with that pause before each.
    Slow(usize, Duration),
    /// No `Content-Length`; the body ends with the connection.
    NoLength,
    /// No `Content-Length`; the body comes in chunks.
    Chunked,
    /// This, if a range was asked for.
    OnRanges(Box<Fault>),
}

impl Fault {
    /// A bare status.
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
        // Rules of one kind form a queue; one of each kind applies to a request.
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

/// Which bytes are sent to a range.
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

/// How the bytes leave.
pub(super) struct Sending {
    pub(super) limit: usize,
    /// After `limit` bytes: wait instead of closing.
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
