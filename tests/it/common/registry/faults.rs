//! What can go wrong with an answer, and making it so.

use std::time::Duration;

use super::answers::State;
use super::wire::Answer;

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

pub(super) fn take_faults(state: &mut State, target: &str) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (part, times, fault) in &mut state.rules {
        // Rules of one kind form a queue; one of each kind applies to a request.
        let kind = std::mem::discriminant(fault);
        let queued = faults.iter().any(|taken| std::mem::discriminant(taken) == kind);
        if *times > 0 && !queued && target.contains(part.as_str()) {
            *times -= 1;
            faults.push(fault.clone());
        }
    }
    faults
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
}

pub(super) fn distort(mut answer: Answer, faults: &[Fault]) -> (Answer, Sending) {
    let mut sending = Sending {
        limit: usize::MAX,
        hang: false,
        silence: false,
        hangup: false,
        pace: None,
        no_length: false,
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
            Fault::IgnoreRange => {}
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
        }
    }
    (answer, sending)
}
