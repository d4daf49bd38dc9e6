//! The negotiation of an NBD connection: the client asks what there is and chooses the export.
//!
//! The module knows the options EXPORT_NAME, ABORT, LIST, INFO and GO. All others are refused, so that clients do
//! without them.

use std::io::{Read, Write};

use super::{NbdError, read_array};
use crate::disk::LONGEST_READ;

/// Longest option in bytes: a name (4096 in the specification) and a list of information requests.
pub const LONGEST_OPTION: u32 = 16 << 10;
/// Most options of one negotiation. Real clients send fewer than ten.
const MOST_OPTIONS: usize = 256;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Server flags: fixed newstyle, and no zeros behind the answer to EXPORT_NAME.
const SERVER_FLAGS: u16 = 1 | 2;
/// Client flag: no zeros behind the answer to EXPORT_NAME.
const CLIENT_NO_ZEROES: u32 = 2;
/// Client flags that exist.
const CLIENT_FLAGS: u32 = 1 | CLIENT_NO_ZEROES;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
const REP_ERR_INVALID: u32 = 1 << 31 | 3;
const REP_ERR_UNKNOWN: u32 = 1 << 31 | 6;
const REP_ERR_TOO_BIG: u32 = 1 << 31 | 9;

/// Preferred size of reads in bytes: a block of the file system.
const PREFERRED: u32 = 4096;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags: the flags are valid, the export is read-only, FLUSH is known, several connections see the same
/// bytes, CACHE is known.
pub(super) const TRANSMISSION_FLAGS: u16 = 1 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 10;

/// How a client broke the rules of the negotiation.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NegotiationError {
    /// Flags that no specification knows.
    #[error("the client wants unknown flags {0:#x}")]
    Flags(u32),
    /// Bytes that are no option.
    #[error("option with the wrong magic number {0:#018x}")]
    Magic(u64),
    /// An export that does not exist, chosen in a way that allows no answer.
    #[error("there is no export with this name: the name is empty")]
    Name,
    /// Options without end.
    #[error("the client sends options without choosing an export")]
    Options,
}

/// Reads the client's options and answers them until it chooses the export. Returns false if it chooses none.
pub(super) fn negotiate(size: u64, input: &mut impl Read, output: &mut impl Write) -> Result<bool, NbdError> {
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(NBDMAGIC.to_be_bytes());
    greeting.extend(IHAVEOPT.to_be_bytes());
    greeting.extend(SERVER_FLAGS.to_be_bytes());
    output.write_all(&greeting)?;
    let flags = u32::from_be_bytes(read_array(input)?);
    if flags & !CLIENT_FLAGS != 0 {
        return Err(NegotiationError::Flags(flags).into());
    }
    for _ in 0..MOST_OPTIONS {
        let (option, data) = option(input)?;
        let answer = match &data {
            None => Answer::refuse(option, REP_ERR_TOO_BIG, "the option is too long"),
            Some(data) => answer(option, data, size, flags & CLIENT_NO_ZEROES == 0)?,
        };
        // A client that aborts may close the connection before it gets the answer.
        let sent = output.write_all(&answer.bytes);
        match answer.then {
            Then::Abort => return Ok(false),
            Then::Transmit => return sent.map(|()| true).map_err(Into::into),
            Then::Continue => sent?,
        }
    }
    Err(NegotiationError::Options.into())
}

/// Reads an option and its data. The data is `None`, and was skipped, if it is too long.
fn option(input: &mut impl Read) -> Result<(u32, Option<Vec<u8>>), NbdError> {
    let magic = u64::from_be_bytes(read_array(input)?);
    if magic != IHAVEOPT {
        return Err(NegotiationError::Magic(magic).into());
    }
    let option = u32::from_be_bytes(read_array(input)?);
    let length = u32::from_be_bytes(read_array(input)?);
    if length > LONGEST_OPTION {
        let skipped = std::io::copy(&mut input.take(length.into()), &mut std::io::sink())?;
        return match skipped == u64::from(length) {
            true => Ok((option, None)),
            false => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
        };
    }
    let mut data = vec![0; length as usize];
    input.read_exact(&mut data)?;
    Ok((option, Some(data)))
}

/// What follows an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Continue,
    Transmit,
    Abort,
}

/// The answer to an option.
#[derive(Debug)]
struct Answer {
    bytes: Vec<u8>,
    then: Then,
}

impl Answer {
    /// Appends a reply of a type.
    fn reply(mut self, option: u32, kind: u32, data: &[u8]) -> Self {
        self.bytes.extend(REPLY_MAGIC.to_be_bytes());
        self.bytes.extend(option.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        // All data is made here and is short.
        self.bytes.extend((data.len() as u32).to_be_bytes());
        self.bytes.extend(data);
        self
    }

    fn then(then: Then) -> Self {
        Self {
            bytes: Vec::new(),
            then,
        }
    }

    /// An error with a text for people.
    fn refuse(option: u32, kind: u32, text: &str) -> Self {
        Self::then(Then::Continue).reply(option, kind, text.as_bytes())
    }
}

/// Returns the answer to an option. `zeros` says whether the client wants the zeros behind the answer to EXPORT_NAME.
fn answer(option: u32, data: &[u8], size: u64, zeros: bool) -> Result<Answer, NegotiationError> {
    let unknown = |option| Answer::refuse(option, REP_ERR_UNKNOWN, "the only export has the empty name");
    let invalid = |option| Answer::refuse(option, REP_ERR_INVALID, "the option's data is not valid");
    Ok(match option {
        OPT_EXPORT_NAME if data.is_empty() => {
            let mut answer = Answer::then(Then::Transmit);
            answer.bytes.extend(size.to_be_bytes());
            answer.bytes.extend(TRANSMISSION_FLAGS.to_be_bytes());
            answer.bytes.extend(zeros.then_some([0; 124]).iter().flatten());
            answer
        }
        // The option allows no answer but the export.
        OPT_EXPORT_NAME => return Err(NegotiationError::Name),
        OPT_ABORT => Answer::then(Then::Abort).reply(option, REP_ACK, &[]),
        OPT_LIST if !data.is_empty() => invalid(option),
        // An entry is the length of the name and the name.
        OPT_LIST => Answer::then(Then::Continue)
            .reply(option, REP_SERVER, &0u32.to_be_bytes())
            .reply(option, REP_ACK, &[]),
        OPT_INFO | OPT_GO => match chosen(data) {
            None => invalid(option),
            Some(name) if !name.is_empty() => unknown(option),
            Some(_) => {
                let then = if option == OPT_GO {
                    Then::Transmit
                } else {
                    Then::Continue
                };
                let export = [
                    &INFO_EXPORT.to_be_bytes()[..],
                    &size.to_be_bytes(),
                    &TRANSMISSION_FLAGS.to_be_bytes(),
                ];
                // Smallest, preferred and largest read.
                let sizes = [1u32, PREFERRED, LONGEST_READ].map(u32::to_be_bytes);
                let sizes = [&INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes.concat()];
                Answer::then(then)
                    .reply(option, REP_INFO, &export.concat())
                    .reply(option, REP_INFO, &sizes.concat())
                    .reply(option, REP_ACK, &[])
            }
        },
        _ => Answer::refuse(option, REP_ERR_UNSUP, "the option is not known here"),
    })
}

/// Returns the name in the data of INFO and GO: its length, the name, the number of information requests, the
/// requests. All information is sent, whatever the client requests.
fn chosen(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    let (count, requests) = rest.split_first_chunk::<2>()?;
    (requests.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some(name)
}
