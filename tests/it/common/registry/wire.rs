//! The part of HTTP/1.1 that registries and their clients use.

use std::collections::HashMap;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::faults::Sending;

pub(super) struct Request {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: HashMap<String, String>,
    pub(super) body: Vec<u8>,
}

impl Request {
    pub(super) fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    /// The body as text.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(super) fn query(&self, name: &str) -> Option<String> {
        let url = reqwest::Url::parse(&format!("http://x{}", self.target)).unwrap();
        url.query_pairs()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.into_owned())
    }
}

pub(super) async fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).await.ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next()?, words.next()?);
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).await.ok().filter(|n| *n > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).await.ok()?;
    Some(Request {
        method,
        target,
        headers,
        body,
    })
}

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    pub(super) fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    pub(super) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(super) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub(super) fn error(status: u16, code: &str) -> Self {
        let body = serde_json::json!({"errors": [{"code": code, "message": "told by the test registry"}]});
        Self::new(status)
            .header("Content-Type", "application/json")
            .body(body.to_string())
    }
}

/// Sends an answer. Returns whether the connection can be used again.
pub(super) async fn send(stream: &mut TcpStream, request: &Request, answer: &Answer, sending: &Sending) -> bool {
    if sending.silence {
        wait_for_close(stream).await;
        return false;
    }
    if sending.hangup {
        return false;
    }
    let mut head = format!("HTTP/1.1 {} X\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    match (sending.no_length, sending.chunked) {
        (true, _) => head.push_str("Connection: close\r\n\r\n"),
        (false, true) => head.push_str("Transfer-Encoding: chunked\r\n\r\n"),
        (false, false) => head.push_str(&format!("Content-Length: {}\r\n\r\n", answer.body.len())),
    }
    if stream.write_all(head.as_bytes()).await.is_err() {
        return false;
    }
    if request.method == "HEAD" {
        return true;
    }
    let body = &answer.body[..answer.body.len().min(sending.limit)];
    let (size, pause) = sending.pace.unwrap_or((body.len().max(1), Duration::ZERO));
    for piece in body.chunks(size) {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let sent = match sending.chunked {
            true => {
                let chunk = [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
                stream.write_all(&chunk).await
            }
            false => stream.write_all(piece).await,
        };
        if sent.is_err() {
            return false;
        }
    }
    if sending.chunked && sending.limit >= answer.body.len() && stream.write_all(b"0\r\n\r\n").await.is_err() {
        return false;
    }
    if sending.hang {
        wait_for_close(stream).await;
    }
    sending.limit >= answer.body.len() && !sending.no_length
}

async fn wait_for_close(stream: &mut TcpStream) {
    let mut byte = [0];
    while matches!(stream.read(&mut byte).await, Ok(n) if n > 0) {}
}

/// Answers a TLS hello in plain text, as web servers do.
pub(super) async fn refuse_tls(stream: &mut TcpStream) {
    if stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.is_ok() {
        wait_for_close(stream).await;
    }
}
