//! The transmission phase of an NBD connection: requests and replies.

use std::io::{self, Read, Write};
use std::sync::{Mutex, mpsc};

use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::{NbdError, read_array};
use crate::disk::{ClientShares, Disk, LONGEST_AT_ONCE, LONGEST_READ};

/// Longest data of a write that is skipped, in bytes. A write is always refused.
const LONGEST_WRITE: u32 = LONGEST_READ;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Bytes of a reply before the data.
const HEAD: usize = 16;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_CACHE: u16 = 5;
const CMD_WRITE_ZEROES: u16 = 6;

/// Error numbers of the protocol.
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// A request: 28 bytes on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct NbdRequest {
    command: u16,
    /// A number by which the client recognises the answer.
    cookie: [u8; 8],
    offset: u64,
    length: u32,
}

impl NbdRequest {
    fn read(input: &mut impl Read) -> Result<Self, NbdError> {
        let magic = u32::from_be_bytes(read_array(input)?);
        if magic != REQUEST_MAGIC {
            return Err(NbdError::Magic { magic });
        }
        let _flags: [u8; 2] = read_array(input)?;
        Ok(Self {
            command: u16::from_be_bytes(read_array(input)?),
            cookie: read_array(input)?,
            offset: u64::from_be_bytes(read_array(input)?),
            length: u32::from_be_bytes(read_array(input)?),
        })
    }

    /// Whether the range lies on the disk and is not too long for a read.
    fn fits(&self, disk: &Disk) -> bool {
        let end = self.offset.checked_add(self.length.into());
        self.length > 0 && self.length <= LONGEST_READ && end.is_some_and(|end| end <= disk.size())
    }

    /// The first bytes of the reply.
    fn head(&self, error: u32) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
        head[4..8].copy_from_slice(&error.to_be_bytes());
        head[8..].copy_from_slice(&self.cookie);
        head
    }
}

/// The answer to a read that had to wait.
#[derive(Debug)]
struct Late {
    request: NbdRequest,
    /// The bytes, or an error number.
    result: Result<Vec<u8>, u32>,
    /// The answer counts as a read that waits until it is sent.
    _share: OwnedSemaphorePermit,
}

/// How a connection ends without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The client said that it is done.
    Disconnected,
    /// The client closed the connection, or is dead.
    Vanished,
}

/// Answers requests until the client disconnects.
pub(super) fn transmit<R, W>(disk: &Disk, runtime: &Handle, input: R, output: W) -> Result<(), NbdError>
where
    R: Read,
    W: Write + Send,
{
    // The shares bound the number of answers.
    let (late, answers) = mpsc::channel();
    let output = Mutex::new(output);
    std::thread::scope(|scope| {
        let sender = std::thread::Builder::new().name("nbd-late".to_owned());
        let sending = {
            let output = &output;
            sender.spawn_scoped(scope, move || send_late(output, &answers))?
        };
        let taken = take(disk, runtime, input, &output, late);
        // The sender ends with the last read that waits.
        let sent = sending.join().unwrap_or(Ok(()));
        match taken {
            Ok(End::Vanished) => Ok(()),
            Ok(End::Disconnected) => sent.map_err(NbdError::Io),
            Err(error) => Err(error),
        }
    })
}

/// Takes requests, and answers those that need not wait, until the client disconnects.
fn take<R: Read, W: Write>(
    disk: &Disk,
    runtime: &Handle,
    mut input: R,
    output: &Mutex<W>,
    late: mpsc::Sender<Late>,
) -> Result<End, NbdError> {
    let shares = ClientShares::default();
    let mut waiting = JoinSet::new();
    let mut buffer = vec![0; HEAD + LONGEST_AT_ONCE];
    let result = loop {
        while waiting.try_join_next().is_some() {}
        let request = match NbdRequest::read(&mut input) {
            Ok(request) => request,
            Err(NbdError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => break Ok(End::Vanished),
            Err(error) => break Err(error),
        };
        let error = match request.command {
            CMD_DISC => break Ok(End::Disconnected),
            CMD_READ if request.fits(disk) => {
                // A read that is too long for the buffer waits for memory like one that waits for bytes.
                let here = buffer.get_mut(..HEAD + request.length as usize).and_then(|answer| {
                    disk.read_local(request.offset, &mut answer[HEAD..])?;
                    Some(answer)
                });
                let Some(answer) = here else {
                    let share = runtime.block_on(shares.take(request.length));
                    waiting.spawn_on(read_late(disk.clone(), request, share, late.clone()), runtime);
                    continue;
                };
                answer[..HEAD].copy_from_slice(&request.head(0));
                match output.lock().expect("no panic while locked").write_all(answer) {
                    Ok(()) => continue,
                    Err(error) => break Err(error.into()),
                }
            }
            CMD_CACHE if request.fits(disk) => {
                // It holds no bytes.
                let share = runtime.block_on(shares.take(0));
                waiting.spawn_on(fetch_ahead(disk.clone(), request, share), runtime);
                0
            }
            // There is nothing to flush.
            CMD_FLUSH => 0,
            CMD_WRITE if request.length > LONGEST_WRITE => {
                break Err(NbdError::TooLong { length: request.length });
            }
            CMD_WRITE => {
                let mut data = (&mut input).take(request.length.into());
                if let Err(error) = io::copy(&mut data, &mut io::sink()) {
                    break Err(error.into());
                }
                EPERM
            }
            CMD_TRIM | CMD_WRITE_ZEROES => EPERM,
            _ => EINVAL,
        };
        let head = request.head(error);
        if let Err(error) = output.lock().expect("no panic while locked").write_all(&head) {
            break Err(error.into());
        }
    };
    match result {
        // The client gets the answers to all requests that it sent before.
        Ok(End::Disconnected) => while runtime.block_on(waiting.join_next()).is_some() {},
        // No client needs the answers.
        Ok(End::Vanished) | Err(_) => waiting.abort_all(),
    }
    result
}

/// Reads bytes that are not local, and passes the answer on.
async fn read_late(disk: Disk, request: NbdRequest, share: OwnedSemaphorePermit, late: mpsc::Sender<Late>) {
    let result = disk.read(request.offset, request.length as usize).await;
    // If the receiver is gone, the connection broke.
    let _ = late.send(Late {
        request,
        // The content logs errors.
        result: result.map_err(|_| EIO),
        _share: share,
    });
}

/// Requests bytes that the client will read later. The request was answered before.
async fn fetch_ahead(disk: Disk, request: NbdRequest, share: OwnedSemaphorePermit) {
    disk.fetch_ahead(request.offset, request.length as usize).await;
    drop(share);
}

/// Sends answers until no read waits and none will.
fn send_late<W: Write>(output: &Mutex<W>, answers: &mpsc::Receiver<Late>) -> io::Result<()> {
    for answer in answers {
        let (error, bytes) = match &answer.result {
            Ok(bytes) => (0, &bytes[..]),
            Err(error) => (*error, &[][..]),
        };
        let mut output = output.lock().expect("no panic while locked");
        output.write_all(&answer.request.head(error))?;
        output.write_all(bytes)?;
    }
    Ok(())
}
