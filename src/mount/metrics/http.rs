//! As much of an HTTP/1.1 server as a monitoring system needs: it answers `GET /metrics`, and closes the connection.
//!
//! Invariants:
//! - A connection has [`DEADLINE`] for its request and for taking the answer, and at most [`LONGEST_HEAD`] bytes of its request
//!   are read.
//! - At most [`CLIENTS`] connections are open at a time. Further ones wait in the queue of the socket.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// Time for a client to send its request, and to take the answer. A larger value lets stuck clients keep others out longer; a
/// smaller one drops slow clients.
const DEADLINE: Duration = Duration::from_secs(5);
/// Most bytes of the head of a request. Monitoring systems send a few hundred.
const LONGEST_HEAD: usize = 16 << 10;
/// Most clients at a time. More clients could take more memory and descriptors of the process; fewer could be blocked by a
/// few stuck ones.
const CLIENTS: usize = 16;
/// Pause after a failed attempt to accept a connection. A smaller value uses processor time while descriptors are
/// short; a larger one delays clients.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that clients connect to.
pub(super) trait Listener {
    /// A connection to a client.
    type Item: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Waits for the next client.
    fn client(&self) -> impl Future<Output = io::Result<Self::Item>> + Send;
}

impl Listener for TcpListener {
    type Item = TcpStream;

    async fn client(&self) -> io::Result<TcpStream> {
        Ok(self.accept().await?.0)
    }
}

impl Listener for UnixListener {
    type Item = UnixStream;

    async fn client(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

/// Serves clients for ever. `figures` returns what a client gets. If there are no figures, it gets an error.
pub(super) async fn serve<F>(listener: impl Listener, figures: impl Fn() -> F + Clone + Send + Sync + 'static)
where
    F: Future<Output = Option<String>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.client().await {
            Ok(stream) => {
                let figures = figures.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, figures).await {
                        tracing::debug!(%error, "a client of the metrics");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                // The process may have no free descriptor for a moment.
                tracing::warn!(%error, "cannot accept a client of the metrics");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn answer<S, F>(mut stream: S, figures: impl Fn() -> F) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Option<String>>,
{
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let head = tokio::time::timeout(DEADLINE, head(&mut stream))
        .await
        .map_err(late)??;
    let asked = asked(&head);
    let figures = match asked {
        Asked::Figures { .. } => tokio::time::timeout(DEADLINE, figures()).await.map_err(late)?,
        Asked::Other | Asked::OtherMethod | Asked::Nonsense => None,
    };
    let response = response(&asked, figures);
    let writing = async {
        stream.write_all(response.as_bytes()).await?;
        stream.shutdown().await
    };
    tokio::time::timeout(DEADLINE, writing).await.map_err(late)?
}

/// Reads the head of a request. Returns what came if the client closes or the head is too long.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while head.len() < LONGEST_HEAD && !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut piece).await? {
            0 => break,
            length => head.extend_from_slice(&piece[..length]),
        }
    }
    Ok(head)
}

/// What a client wants.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// The figures, or only the head of the response.
    Figures { head_only: bool },
    /// Another page.
    Other,
    /// Something that does not exist here.
    OtherMethod,
    /// No request of HTTP/1, or one that is too long.
    Nonsense,
}

fn asked(head: &[u8]) -> Asked {
    let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let line = std::str::from_utf8(line).unwrap_or_default();
    let words: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = words[..] else {
        return Asked::Nonsense;
    };
    if !version.starts_with("HTTP/1.") || head.len() >= LONGEST_HEAD {
        return Asked::Nonsense;
    }
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET" | "HEAD", "/metrics") => Asked::Figures {
            head_only: method == "HEAD",
        },
        ("GET" | "HEAD", _) => Asked::Other,
        _ => Asked::OtherMethod,
    }
}

fn response(asked: &Asked, figures: Option<String>) -> String {
    let (status, text) = match (asked, figures) {
        (Asked::Figures { .. }, Some(figures)) => ("200 OK", figures),
        (Asked::Figures { .. }, None) => ("503 Service Unavailable", "the mount is about to end\n".to_owned()),
        (Asked::Other, _) => ("404 Not Found", "the metrics are at /metrics\n".to_owned()),
        (Asked::OtherMethod, _) => (
            "405 Method Not Allowed\r\nAllow: GET, HEAD",
            "GET /metrics\n".to_owned(),
        ),
        (Asked::Nonsense, _) => ("400 Bad Request", "GET /metrics\n".to_owned()),
    };
    let mut response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        text.len()
    );
    if *asked != (Asked::Figures { head_only: true }) {
        response.push_str(&text);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_understood() {
        let figures = |head_only| Asked::Figures { head_only };
        for (head, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", figures(false)),
            ("HEAD /metrics?a=b HTTP/1.0\r\n\r\n", figures(true)),
            ("GET / HTTP/1.1\r\n\r\n", Asked::Other),
            ("POST /metrics HTTP/1.1\r\n\r\n", Asked::OtherMethod),
            ("GET /metrics\r\n\r\n", Asked::Nonsense),
            ("GET /metrics SSH/2.0\r\n\r\n", Asked::Nonsense),
            ("\u{16}\u{3}\u{1}", Asked::Nonsense),
            ("", Asked::Nonsense),
        ] {
            assert_eq!(asked(head.as_bytes()), expected, "{head:?}");
        }
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "a".repeat(LONGEST_HEAD));
        assert_eq!(asked(long.as_bytes()), Asked::Nonsense);
    }

    /// Sends bytes to [`answer`] and returns what comes back.
    async fn ask(request: &[u8]) -> String {
        let (client, server) = tokio::io::duplex(64);
        let (mut reading, mut writing) = tokio::io::split(client);
        let asking = async {
            let mut response = String::new();
            // A server that has read enough reads no more.
            tokio::select! {
                biased;
                read = reading.read_to_string(&mut response) => drop(read.unwrap()),
                _ = async {
                    let _ = writing.write_all(request).await;
                    std::future::pending::<()>().await
                } => {}
            }
            response
        };
        let (answered, response) = tokio::join!(answer(server, async || Some("figures\n".to_owned())), asking);
        answered.unwrap();
        response
    }

    #[tokio::test]
    async fn the_length_of_a_request_is_bounded() {
        let got = ask(b"GET /metrics HTTP/1.1\r\n\r\n").await;
        assert!(
            got.starts_with("HTTP/1.1 200 OK\r\n") && got.ends_with("\r\n\r\nfigures\n"),
            "{got}"
        );
        let got = ask(b"HEAD /metrics HTTP/1.1\r\n\r\n").await;
        assert!(
            got.contains("Content-Length: 8\r\n") && got.ends_with("\r\n\r\n"),
            "{got}"
        );
        let got = ask(&b"GET /metrics HTTP/1.1\r\nX: "
            .iter()
            .copied()
            .chain(std::iter::repeat_n(b'a', 1 << 20))
            .collect::<Vec<_>>())
        .await;
        assert!(got.starts_with("HTTP/1.1 400 "), "{got}");
    }
}
