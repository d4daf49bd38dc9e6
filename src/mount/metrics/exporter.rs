//! Gives the figures of a mount to their place, as long as the mount lasts.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::MetricsPlace;
use super::http;
use super::samples::{MountLife, text};
use crate::mount::control::{Call, Request, Response};
use crate::mount::error::MountError;
use crate::mount::socket_file::SocketFile;
use crate::mount::status::MountStatus;
use crate::os::gone;

/// Time between two writes of a file. Monitoring systems ask about every fifteen seconds. A larger value shows them older
/// figures; a smaller one writes more often.
const INTERVAL: Duration = Duration::from_secs(5);

/// A place that can be used.
#[derive(Debug)]
enum OpenPlace {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
    File(PathBuf),
}

/// The open place of a mount's figures.
#[derive(Debug)]
pub(in super::super) struct Exporter(OpenPlace);

impl Exporter {
    /// Opens a place. Fails if it cannot be used.
    pub(in super::super) async fn open(place: &MetricsPlace) -> Result<Self, MountError> {
        let failed = |place: String| move |source| MountError::Metrics { place, source };
        match place {
            MetricsPlace::Tcp(address) => {
                let listener = TcpListener::bind(address).await.map_err(failed(address.to_string()))?;
                Ok(Self(OpenPlace::Tcp(listener)))
            }
            MetricsPlace::Unix(path) => {
                let failed = failed(path.display().to_string());
                let listen = || -> io::Result<_> {
                    let (listener, file) = SocketFile::bind(path)?;
                    listener.set_nonblocking(true)?;
                    Ok((UnixListener::from_std(listener)?, file))
                };
                let (listener, file) = listen().map_err(failed)?;
                Ok(Self(OpenPlace::Unix(listener, file)))
            }
            MetricsPlace::File(path) => {
                // Shows now whether files can be made in the directory.
                let probe = || -> io::Result<()> {
                    if path.is_dir() {
                        return Err(io::ErrorKind::IsADirectory.into());
                    }
                    File::create(draft(path))?;
                    std::fs::remove_file(draft(path))
                };
                probe().map_err(failed(path.display().to_string()))?;
                Ok(Self(OpenPlace::File(path.clone())))
            }
        }
    }

    /// Names the place. A port that was chosen by the kernel has its number.
    pub(in super::super) fn place(&self) -> String {
        match &self.0 {
            OpenPlace::Tcp(listener) => listener.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string()),
            OpenPlace::Unix(_, socket) => format!("unix:{}", socket.path().display()),
            OpenPlace::File(path) => path.display().to_string(),
        }
    }

    /// Begins to give the figures, which come from the mount that answers `calls`.
    pub(in super::super) fn start(self, calls: mpsc::Sender<Call>) -> Exporting {
        let figures = move || {
            let calls = calls.clone();
            async move { Some(text(&status(calls).await?, MountLife::Lasting)) }
        };
        let (task, file, socket) = match self.0 {
            OpenPlace::Tcp(listener) => (tokio::spawn(http::serve(listener, figures)), None, None),
            OpenPlace::Unix(listener, socket) => (tokio::spawn(http::serve(listener, figures)), None, Some(socket)),
            OpenPlace::File(path) => {
                let file = path.clone();
                let writing = async move {
                    let mut interval = tokio::time::interval(INTERVAL);
                    let mut failing = false;
                    loop {
                        interval.tick().await;
                        let Some(figures) = figures().await else { return };
                        let written = write(&path, &figures);
                        // One warning for a disk that stays full is enough.
                        if let (Err(error), false) = (&written, failing) {
                            tracing::warn!(path = %path.display(), %error, "cannot write the metrics");
                        }
                        failing = written.is_err();
                    }
                };
                (tokio::spawn(writing), Some(file), None)
            }
        };
        Exporting {
            task,
            file,
            _socket: socket,
        }
    }
}

/// The task that gives the figures of a mount.
#[derive(Debug)]
pub(in super::super) struct Exporting {
    task: JoinHandle<()>,
    file: Option<PathBuf>,
    _socket: Option<SocketFile>,
}

impl Exporting {
    /// Ends the task. A file gets the last figures.
    pub(in super::super) async fn end(self, last: &MountStatus) {
        self.task.abort();
        // An error only says that the task was aborted.
        let _ = self.task.await;
        if let Some(path) = &self.file
            && let Err(error) = write(path, &text(last, MountLife::Ended))
        {
            tracing::warn!(path = %path.display(), %error, "cannot write the last metrics");
        }
    }
}

/// Asks the mount for its status. Returns none if the mount is about to end.
async fn status(calls: mpsc::Sender<Call>) -> Option<MountStatus> {
    let (sender, receiver) = oneshot::channel();
    calls.send((Request::Status, sender)).await.ok()?;
    match receiver.await.ok()? {
        Response::Status(status) => Some(*status),
        _ => None,
    }
}

/// Returns where a file is written before it gets its name. Programs that read all files of the directory know by the ending
/// that it is not one of theirs.
fn draft(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    name.into()
}

/// Writes a file whole or not at all. All users may read it.
fn write(path: &Path, figures: &str) -> io::Result<()> {
    let draft = draft(path);
    let write = || -> io::Result<()> {
        File::create(&draft)?.write_all(figures.as_bytes())?;
        std::fs::rename(&draft, path)
    };
    write().inspect_err(|_| {
        // The first error says what is wrong.
        let _ = gone(std::fs::remove_file(&draft));
    })
}
