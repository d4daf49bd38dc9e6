//! NBD server: serves a [`Disk`] to virtual machine monitors and other NBD clients.
//!
//! The protocol is the fixed newstyle negotiation and the transmission phase with simple replies of the NBD
//! specification (doc/proto.md of the NetworkBlockDevice project). A server has one export, whose name is empty. It
//! is read-only, and all connections see the same bytes, so a client may use several connections at once.
//!
//! One thread for each connection takes requests, in order, and answers at once if the bytes are local. A read that
//! has to wait becomes a task, and a second thread sends its answer when the bytes are there. So such a read does not
//! delay the reads behind it.
//!
//! Invariants:
//! - A connection uses bounded memory: [`disk::IN_FLIGHT`](crate::disk::IN_FLIGHT) bytes for reads that wait, one buffer of
//!   [`disk::LONGEST_AT_ONCE`](crate::disk::LONGEST_AT_ONCE) bytes, and one option of [`LONGEST_OPTION`] bytes.
//! - A read that fails is an error of that request. The connection goes on.
//! - A client that breaks the protocol loses its connection, and no other client notices.

mod negotiation;
mod transmission;

use std::io::{self, Read, Write};

use tokio::runtime::Handle;

pub use self::negotiation::{LONGEST_OPTION, NegotiationError};
use crate::disk::Disk;

/// Why a connection ended before the client said that it is done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The client broke the rules of the negotiation.
    #[error(transparent)]
    Negotiation(#[from] NegotiationError),
    /// The client sent bytes that are no request.
    #[error("request with the wrong magic number {magic:#010x}")]
    Magic {
        /// The number in place of the magic number.
        magic: u32,
    },
    /// The client sent a request that carries too much data.
    #[error("request with {length} bytes of data")]
    TooLong {
        /// The length that the request states.
        length: u32,
    },
}

/// Serves one connection until the client disconnects. Blocks the thread, which must not belong to a runtime. Reads
/// that have to wait run on `runtime`. `chosen` is called when the client has chosen the export. Until then the caller may
/// want a deadline for what the client sends.
///
/// `input` should be buffered, because requests are read in pieces of a few bytes.
pub fn serve<R, W>(
    disk: &Disk,
    runtime: &Handle,
    mut input: R,
    mut output: W,
    chosen: impl FnOnce() -> io::Result<()>,
) -> Result<(), NbdError>
where
    R: Read,
    W: Write + Send,
{
    if !negotiation::negotiate(disk.size(), &mut input, &mut output)? {
        return Ok(());
    }
    chosen()?;
    transmission::transmit(disk, runtime, input, output)
}

/// Reads exactly `N` bytes.
fn read_array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}
