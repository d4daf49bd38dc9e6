//! The control socket of a mount: JSON lines over a Unix socket.
//!
//! A client sends one line, its request. The process replies with one or more lines, and the last of them is the
//! answer. Until the process has the answer, it sends [`Response::Working`] at short intervals. So a client can
//! tell a process that needs time, to flush changes for example, from one that is stopped or stuck.
//!
//! The process does not carry out a request if the client is gone by the time it reads the request.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::status::MountStatus;
use super::summary::RunSummary;

/// Time for a client to send its line, and time to take a line from this process. After that the process drops the
/// connection. A larger value lets stuck clients hold connections longer; a smaller one drops slow clients.
const DEADLINE: Duration = Duration::from_secs(10);
/// Interval at which the process reports that it works on a request. It must be well below [`SILENCE`]. A smaller
/// value only wakes client and process more often.
const SIGN: Duration = Duration::from_millis(200);
/// How long a client waits for the next line. A larger value delays `umount` and `list` when a process hangs. A
/// smaller one reports a busy process as one that does not answer.
const SILENCE: Duration = Duration::from_millis(1000);
/// How long a client waits for the answer itself, while the process reports that it works. A larger value delays
/// the commands; a smaller one gives up on more requests that would succeed.
const PATIENCE: Duration = Duration::from_millis(1300);
/// Pause after a failed attempt to accept a connection. A smaller value uses processor time while descriptors are
/// short; a larger one delays clients.
const PAUSE: Duration = Duration::from_millis(100);
/// Largest request in bytes. A request is a few words long; a client cannot make the process buffer more.
const MAX_REQUEST: u64 = 4096;

/// A request of a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// Asks for the status of the mount.
    Status,
    /// Asks the process to take the mount down.
    Unmount {
        /// Whether to unmount even if the mount is in use.
        lazy: bool,
    },
}

/// A reply of the process behind the mount.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Response {
    /// The process works on the request, and the answer follows.
    Working,
    /// The answer to [`Request::Status`].
    Status(Box<MountStatus>),
    /// The mount is unmounted, and the process is about to end.
    Unmounted {
        /// What the mount has done.
        #[serde(default)]
        summary: Option<Box<RunSummary>>,
    },
    /// The mount is unmounted, and the process goes on because the mount still has users.
    Detached {
        /// What the mount has done so far.
        #[serde(default)]
        summary: Option<Box<RunSummary>>,
    },
    /// The mount could not be unmounted.
    Failed {
        /// The cause.
        message: String,
    },
}

/// Why a client got no answer from the process behind a mount.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The client got no connection, or the connection broke.
    #[error("cannot talk to the process of this mount: {0}")]
    Io(#[from] io::Error),
    /// The reply is no valid [`Response`].
    #[error("the process of this mount answered unintelligibly: {0}")]
    Json(#[from] serde_json::Error),
    /// The process sent no line in time.
    #[error("the process of this mount does not answer")]
    Silent,
    /// The process works on the request, but the answer did not come in time.
    #[error("the process of this mount needs a long time to answer")]
    Slow,
}

/// A request, and the channel for its answer.
pub(super) type Call = (Request, oneshot::Sender<Response>);

/// The open control socket of this process.
#[derive(Debug)]
pub(super) struct Control {
    accepting: JoinHandle<()>,
    /// Closes when the last connection ends. Each connection holds a sender and never sends on it.
    connections: mpsc::Receiver<Infallible>,
}

impl Control {
    /// Serves the socket and sends the requests to `calls`.
    pub(super) fn serve(listener: UnixListener, calls: mpsc::Sender<Call>) -> Self {
        let (open, connections) = mpsc::channel(1);
        Self {
            accepting: tokio::spawn(accept(listener, calls, open)),
            connections,
        }
    }

    /// Accepts no more connections, and waits until the open ones have sent their answers.
    pub(super) async fn close(mut self) {
        self.accepting.abort();
        // Each connection has deadlines of its own.
        if tokio::time::timeout(2 * DEADLINE, self.connections.recv())
            .await
            .is_err()
        {
            tracing::warn!("a control connection did not take its answer");
        }
    }
}

async fn accept(listener: UnixListener, calls: mpsc::Sender<Call>, open: mpsc::Sender<Infallible>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (calls, open) = (calls.clone(), open.clone());
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, calls).await {
                        tracing::debug!(%error, "control connection");
                    }
                    drop(open);
                });
            }
            Err(error) => {
                // The process may have no free descriptor for a moment.
                tracing::warn!(%error, "control socket");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn answer(stream: UnixStream, calls: mpsc::Sender<Call>) -> Result<(), ControlError> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(read.take(MAX_REQUEST));
    tokio::time::timeout(DEADLINE, reader.read_line(&mut line))
        .await
        .map_err(|_| ControlError::Silent)??;
    let request = serde_json::from_str(&line)?;
    // This write fails if the client is gone. If this process was stopped, the client may have given up and
    // reported an error.
    say(&mut write, &Response::Working).await?;
    let (sender, receiver) = oneshot::channel();
    let answering = async {
        calls.send((request, sender)).await.ok()?;
        receiver.await.ok()
    };
    let mut answering = std::pin::pin!(answering);
    let response = loop {
        match tokio::time::timeout(SIGN, &mut answering).await {
            Ok(response) => break response,
            // A client that goes away at this stage has left its request, and the process carries it out.
            Err(_) => drop(say(&mut write, &Response::Working).await),
        }
    };
    match response {
        Some(response) => Ok(say(&mut write, &response).await?),
        // The process is already taking the mount down. The client sees the end of the connection.
        None => Ok(()),
    }
}

async fn say(write: &mut OwnedWriteHalf, response: &Response) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(response)?;
    bytes.push(b'\n');
    match tokio::time::timeout(DEADLINE, write.write_all(&bytes)).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Sends `request` to the process behind `socket` and returns its answer. Fails with [`ControlError::Silent`] after
/// one second without a line. Fails with [`ControlError::Slow`] if the process works on the request for longer than
/// 1.3 seconds.
pub async fn call(socket: &Path, request: &Request) -> Result<Response, ControlError> {
    let started = Instant::now();
    let connecting = async {
        let mut stream = UnixStream::connect(socket).await?;
        let mut bytes = serde_json::to_vec(request)?;
        bytes.push(b'\n');
        stream.write_all(&bytes).await?;
        Ok::<_, ControlError>(stream)
    };
    let silent = |_| ControlError::Silent;
    let mut reader = BufReader::new(tokio::time::timeout(SILENCE, connecting).await.map_err(silent)??);
    while started.elapsed() < PATIENCE {
        let mut line = String::new();
        let reading = reader.read_line(&mut line);
        if tokio::time::timeout(SILENCE, reading).await.map_err(silent)?? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without an answer").into());
        }
        match serde_json::from_str(&line)? {
            Response::Working => {}
            response => return Ok(response),
        }
    }
    Err(ControlError::Slow)
}
