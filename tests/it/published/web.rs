//! Web servers that serve index files: a plain one that does what a test says, and openssl(1) with TLS.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::common::docker_registry::{certificates, listening_port};
use crate::common::ocifs::{Running, eventually};

/// An answer of a [`PlainServer`].
pub struct Page {
    pub status: u16,
    pub body: Vec<u8>,
    /// Bytes that are sent in a tenth of a second. All at once if none.
    pub rate: Option<usize>,
}

impl Page {
    pub fn found(body: Vec<u8>) -> Self {
        Self {
            status: 200,
            body,
            rate: None,
        }
    }

    pub fn status(status: u16) -> Self {
        Self {
            status,
            body: Vec::new(),
            rate: None,
        }
    }
}

/// A web server without TLS. It answers each name as a function says. Its threads end with the test process.
pub struct PlainServer {
    port: u16,
    requests: Arc<AtomicUsize>,
}

impl PlainServer {
    pub fn start(answer: impl Fn(&str) -> Page + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(AtomicUsize::new(0));
        let (answer, counted) = (Arc::new(answer), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answer, counted) = (answer.clone(), counted.clone());
                // The client may go away at any time.
                std::thread::spawn(move || serve(stream, &*answer, &counted).unwrap_or_default());
            }
        });
        Self { port, requests }
    }

    /// Serves the files of a directory. `page` makes the answer of the content; names that are not there get `missing`.
    pub fn of(directory: &Path, missing: u16, page: fn(Vec<u8>) -> Page) -> Self {
        let directory = directory.to_owned();
        Self::start(move |name| match std::fs::read(directory.join(name)) {
            Ok(content) => page(content),
            Err(_) => Page::status(missing),
        })
    }

    pub fn location(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn serve(stream: TcpStream, answer: &dyn Fn(&str) -> Page, counted: &AtomicUsize) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let name = line
            .split(' ')
            .nth(1)
            .unwrap_or_default()
            .trim_start_matches('/')
            .to_owned();
        while line.trim() != "" {
            line.clear();
            reader.read_line(&mut line)?;
        }
        counted.fetch_add(1, Ordering::SeqCst);
        let page = answer(&name);
        write!(
            stream,
            "HTTP/1.1 {} Answer\r\nContent-Length: {}\r\n\r\n",
            page.status,
            page.body.len()
        )?;
        match page.rate {
            None => stream.write_all(&page.body)?,
            Some(rate) => {
                for piece in page.body.chunks(rate) {
                    std::thread::sleep(Duration::from_millis(100));
                    stream.write_all(piece)?;
                }
            }
        }
    }
}

/// A web server with TLS of its own authority that serves the files of a directory: openssl(1).
pub struct WebServer {
    _process: Running,
    pub port: u16,
    pub authority: PathBuf,
}

impl WebServer {
    pub fn start(directory: &Path, keys: &Path) -> Self {
        Self::start_as(directory, keys, "-WWW")
    }

    /// With `-HTTP`, the files are whole answers, with status line and headers.
    pub fn start_as(directory: &Path, keys: &Path, mode: &str) -> Self {
        let (authority, certificate, key) = certificates(keys);
        let child = Command::new("openssl")
            .args(["s_server", "-accept", "127.0.0.1:0", mode, "-quiet", "-cert"])
            .arg(certificate)
            .arg("-key")
            .arg(key)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let process = Running(child);
        let mut port = 0;
        eventually("the web server listens", || {
            port = listening_port(process.0.id()).unwrap_or(0);
            port != 0
        });
        Self {
            _process: process,
            port,
            authority,
        }
    }
}
