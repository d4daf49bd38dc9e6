//! The control socket of a mount: one JSON request line, one JSON answer line.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::status::MountStatus;

/// A client that does not finish its line by then is dropped; so is a status that does not come.
const DEADLINE: Duration = Duration::from_secs(10);
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
    /// To [`Request::Status`].
    Status(Box<MountStatus>),
    /// It is unmounted.
    Unmounted,
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
    /// It did not answer.
    #[error("the process of this mount does not answer")]
    Timeout,
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
        if tokio::time::timeout(DEADLINE, self.connections.recv()).await.is_err() {
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
        .map_err(|_| ControlError::Timeout)??;
    let request = serde_json::from_str(&line)?;
    let (sender, receiver) = oneshot::channel();
    let response = match calls.send((request, sender)).await {
        Ok(()) => receiver.await.ok(),
        Err(_) => None,
    };
    let response = response.unwrap_or_else(|| Response::Failed {
        message: "the mount is going down".to_owned(),
    });
    let mut bytes = serde_json::to_vec(&response)?;
    bytes.push(b'\n');
    write.write_all(&bytes).await?;
    Ok(())
}

/// Asks the process behind `socket`. An unmount takes as long as it takes: changes may have to be flushed first.
pub async fn call(socket: &Path, request: &Request) -> Result<Response, ControlError> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        let mut bytes = serde_json::to_vec(request)?;
        bytes.push(b'\n');
        stream.write_all(&bytes).await?;
        let mut line = String::new();
        if BufReader::new(stream).read_line(&mut line).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without an answer").into());
        }
        Ok(serde_json::from_str(&line)?)
    };
    match request {
        Request::Unmount { .. } => exchange.await,
        Request::Status => tokio::time::timeout(DEADLINE, exchange)
            .await
            .map_err(|_| ControlError::Timeout)?,
    }
}
