//! The control socket of a mount: one JSON request line, then JSON answer lines, of which the last one is the answer.
//!
//! Until there is an answer, the process says every now and then that it works on it. So a client can tell a process that
//! needs time, because changes have to be flushed, from one that is stopped or stuck. A client that is gone by the time its
//! request is read does not get it fulfilled.

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

/// A client that does not finish its line by then is dropped.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often a process says that it works on a request, and for how long a client waits to hear of it.
const SIGN: Duration = Duration::from_millis(200);
const SILENCE: Duration = Duration::from_millis(1000);
/// How long a client waits for the answer itself.
const PATIENCE: Duration = Duration::from_millis(1300);
/// Time between two attempts to accept a connection, when one failed.
const PAUSE: Duration = Duration::from_millis(100);
/// Requests are a few words.
const MAX_REQUEST: u64 = 4096;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// How the mount is doing.
    Status,
    /// Take the mount down.
    Unmount {
        /// Even if it is in use.
        lazy: bool,
    },
}

/// What the mount answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Response {
    /// The answer will come.
    Working,
    /// To [`Request::Status`].
    Status(Box<MountStatus>),
    /// It is unmounted, and the process is about to end.
    Unmounted,
    /// It is unmounted, and the process goes on because somebody still uses the mount.
    Detached,
    /// It is not.
    Failed {
        /// Why.
        message: String,
    },
}

/// Why the serving process could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No connection, or it broke.
    #[error("cannot talk to the process of this mount: {0}")]
    Io(#[from] io::Error),
    /// It answered something else.
    #[error("the process of this mount answered unintelligibly: {0}")]
    Json(#[from] serde_json::Error),
    /// It says nothing at all.
    #[error("the process of this mount does not answer")]
    Silent,
    /// It works on the request.
    #[error("the process of this mount needs a long time to answer")]
    Slow,
}

/// A request with the place for its answer.
pub(super) type Call = (Request, oneshot::Sender<Response>);

/// The open socket.
#[derive(Debug)]
pub(super) struct Control {
    accepting: JoinHandle<()>,
    /// Ends when the last connection does: each holds a sender that it never uses.
    connections: mpsc::Receiver<Infallible>,
}

impl Control {
    /// Serves the socket; requests go to `calls`.
    pub(super) fn serve(listener: UnixListener, calls: mpsc::Sender<Call>) -> Self {
        let (open, connections) = mpsc::channel(1);
        Self {
            accepting: tokio::spawn(accept(listener, calls, open)),
            connections,
        }
    }

    /// Takes no more connections and lets those under way have their answer.
    pub(super) async fn close(mut self) {
        self.accepting.abort();
        // Each is bounded by its own deadlines.
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
                // Descriptors may be short for a moment.
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
    // This fails if the client is gone: while this process was stopped, it may have given up and said so.
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
            // A client that is gone now has left its request here; it is fulfilled.
            Err(_) => drop(say(&mut write, &Response::Working).await),
        }
    };
    match response {
        Some(response) => Ok(say(&mut write, &response).await?),
        // The mount is going down already: the end of the connection says so.
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

/// Asks the process behind `socket`, and waits no longer than it takes to see that something is wrong.
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
