//! Finds out at the first request whether a registry on this machine has TLS.
//!
//! The client opens one connection for it, sends the first message of a TLS handshake, and looks at the first byte of
//! the response:
//! - A TLS server responds with a TLS record, even if only to refuse.
//! - An HTTP server responds in text. The random field of the message ends with two line ends, so a server that reads
//!   lines takes the message for a complete request.
//! - If a server closes the connection, the client sends a plain HTTP request before it concludes that the server has
//!   no TLS.
//! - Silence decides nothing: the client waits for a slow server.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use reqwest::Url;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

use crate::blob::BlobError;
use crate::registry::endpoint::authority;

/// First bytes of TLS records: alert and handshake.
const TLS_RECORDS: [u8; 2] = [0x15, 0x16];

/// What is known about the registries whose scheme was left open.
#[derive(Debug, Default)]
pub(super) struct Schemes {
    open: Mutex<HashMap<String, Arc<OnceCell<Spoken>>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoken {
    Tls,
    Plain,
}

impl Schemes {
    /// Leaves the scheme of this server open until the first request.
    pub(super) fn leave_open(&self, base: &Url) {
        self.servers().entry(authority(base)).or_default();
    }

    /// Whether a server whose scheme was left open turned out to have no TLS.
    pub(super) fn is_plain(&self, base: &Url) -> bool {
        let servers = self.servers();
        let cell = servers.get(&authority(base));
        cell.and_then(|cell| cell.get()) == Some(&Spoken::Plain)
    }

    /// Returns the URL with the scheme that its server speaks. Asks the server first if the scheme is still open.
    ///
    /// Cancel safe: the next caller asks the server again.
    pub(super) async fn settle(&self, mut url: Url) -> Result<Url, BlobError> {
        let cell = self.servers().get(&authority(&url)).cloned();
        let Some(cell) = cell else { return Ok(url) };
        let spoken = cell
            .get_or_try_init(|| ask(&url))
            .await
            .map_err(|reason| unreachable(&url, &reason))?;
        if *spoken == Spoken::Plain {
            // Changing https to http cannot fail.
            let _ = url.set_scheme("http");
        }
        Ok(url)
    }

    fn servers(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<OnceCell<Spoken>>>> {
        self.open.lock().expect("no panic while locked")
    }
}

fn unreachable(url: &Url, reason: &io::Error) -> BlobError {
    BlobError::Unreachable {
        host: authority(url),
        reason: reason.to_string(),
    }
}

async fn ask(url: &Url) -> io::Result<Spoken> {
    let host = url.host_str().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let stream = match (TcpStream::connect((host, url.port().unwrap_or(443))).await, url.port()) {
        (Ok(stream), _) => stream,
        // The URL names no port, and no server listens on the port of HTTPS.
        (Err(error), None) => return plain(host, 80).await.map_err(|_| error),
        (Err(error), Some(_)) => return Err(error),
    };
    match first_byte(stream, &hello()).await {
        Ok(Some(byte)) if TLS_RECORDS.contains(&byte) => Ok(Spoken::Tls),
        Ok(Some(_)) => Ok(Spoken::Plain),
        Ok(None) | Err(_) => plain(host, url.port().unwrap_or(443)).await,
    }
}

/// Makes the first message of a TLS handshake that will not continue. It is as plain as possible: TLS 1.2 without
/// extensions. Servers still respond to it, if only with an alert.
fn hello() -> Vec<u8> {
    // Cipher suites of TLS 1.2 and 1.3 that servers commonly have.
    const SUITES: [u16; 8] = [0x1301, 0x1302, 0xc02b, 0xc02c, 0xc02f, 0xc030, 0x009c, 0x002f];
    let version = [3, 3];
    let mut random = [0x6f; 32];
    random[28..].copy_from_slice(b"\r\n\r\n");
    let mut body = [&version[..], &random, &[0, 0, 2 * SUITES.len() as u8]].concat();
    body.extend(SUITES.iter().flat_map(|suite| suite.to_be_bytes()));
    // No compression, no extensions.
    body.extend([1, 0]);
    let length = body.len() as u8;
    let record = [0x16, 3, 1, 0, length + 4];
    let message = [1, 0, 0, length];
    [&record[..], &message, &body].concat()
}

async fn first_byte(mut stream: TcpStream, message: &[u8]) -> io::Result<Option<u8>> {
    stream.write_all(message).await?;
    let mut byte = [0];
    Ok((stream.read(&mut byte).await? == 1).then_some(byte[0]))
}

/// Sends a plain HTTP request. A server with TLS responds to it with a 400 in plain text.
async fn plain(host: &str, port: u16) -> io::Result<Spoken> {
    let mut stream = TcpStream::connect((host, port)).await?;
    let request = format!("GET /v2/ HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut line = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut line).await?;
    match line.starts_with(b"HTTP/1.") && !line.ends_with(b" 400") {
        true => Ok(Spoken::Plain),
        false => Err(io::Error::other("the server neither takes TLS nor plain HTTP")),
    }
}
