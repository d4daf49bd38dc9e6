//! An in-process registry that misbehaves on request.
//!
//! A small HTTP/1.1 server on a thread of its own: manifests by tag and digest, blobs with ranges, tags, a token server, a
//! "storage" role that redirects lead to, a log of every request, and faults applied to the requests whose path contains a text.
//! Blobs are shared by all repositories. Tests that mount use it as they would a real registry: `registry.host()`.
#![allow(dead_code)]

mod answers;
mod faults;
mod images;
mod named;
mod wire;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ocifs::oci::Digest;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use self::answers::{State, Storage};
pub use self::faults::Fault;
use self::faults::{Ranging, distort, take_faults};
#[allow(unused_imports)]
pub use self::images::{INDEX, MANIFEST, architecture, image};
#[allow(unused_imports)] // what a test does not need, the one that is run by hand does
pub use self::named::{NAMES, Rule};

/// What a client must show.
#[derive(Debug, Clone, Default)]
pub enum Guard {
    /// Nothing.
    #[default]
    Open,
    /// User and password.
    Basic(String, String),
    /// A token of this server's `/token`.
    Bearer(Tokens),
}

/// How `/token` behaves.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// User and password it wants, if any.
    pub login: Option<(String, String)>,
    /// Refresh token it takes by POST, if any.
    pub identity: Option<String>,
    /// Requests each token is good for.
    pub uses: usize,
    /// `expires_in` it states.
    pub expires_in: u64,
    /// Where tokens are to be had, if not here.
    pub realm: Option<String>,
    /// The 401 carries no challenge; only the one to `/v2/` does.
    pub challenge_at_base_only: bool,
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            login: None,
            identity: None,
            uses: usize::MAX,
            expires_in: 300,
            realm: None,
            challenge_at_base_only: false,
        }
    }
}

/// A request as it arrived and how it was answered.
#[derive(Debug, Clone)]
pub struct Logged {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    pub body: String,
    pub status: u16,
    /// Bytes of the body sent.
    pub sent: usize,
    /// Number of the connection it came over.
    pub connection: usize,
}

/// Makes the token for a scope in place of the built-in one.
pub type Issuer = Box<dyn Fn(&str) -> String + Send + Sync>;

struct Shared {
    state: Mutex<State>,
    connections: AtomicUsize,
    /// Whether a TLS hello gets no answer but the end of the connection.
    hangs_up_on_tls: AtomicBool,
    /// Texts in the targets of requests that get no answer for now.
    held: watch::Sender<Vec<String>>,
}

/// The registry; stops when dropped.
pub struct TestRegistry {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl TestRegistry {
    /// Listens on an ephemeral loopback port; ready when it returns.
    pub fn start() -> Self {
        Self::start_at("127.0.0.1:0")
    }

    /// Listens at an address of this machine, on an ephemeral port if that is 0.
    pub fn start_at(address: &str) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            connections: AtomicUsize::new(0),
            hangs_up_on_tls: AtomicBool::new(false),
            held: watch::Sender::default(),
        });
        let listener = std::net::TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    _ = accept(listener, serving) => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            address,
            shared,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn add_blob(&self, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.state(|state| state.blobs.insert(digest.to_string(), bytes));
        digest
    }

    pub fn add_manifest(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        bytes: impl Into<Vec<u8>>,
    ) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        let document = (media_type.to_owned(), bytes);
        self.state(|state| {
            state
                .manifests
                .insert(format!("{repository}:{digest}"), document.clone());
            let tags = state.tags.entry(repository.to_owned()).or_default();
            if let Some(tag) = tag {
                tags.push(tag.to_owned());
                state.manifests.insert(format!("{repository}:{tag}"), document);
            }
        });
        digest
    }

    /// Config, layers and manifest of a Linux image for this machine's processor; the manifest's digest.
    pub fn add_image(&self, repository: &str, tag: &str, layers: &[Vec<u8>]) -> Digest {
        let image = image(layers);
        self.add_blob(image.config);
        for layer in layers {
            self.add_blob(layer.clone());
        }
        self.add_manifest(repository, Some(tag), MANIFEST, image.manifest)
    }

    /// Applies a fault to the next `times` requests whose target contains `part`.
    pub fn fault(&self, part: &str, times: usize, fault: Fault) {
        self.state(|state| state.rules.push((part.to_owned(), times, fault)));
    }

    /// Applies a fault to all requests for a range whose target contains `part`.
    pub fn fault_ranges(&self, part: &str, fault: Fault) {
        self.fault(part, usize::MAX, Fault::OnRanges(Box::new(fault)));
    }

    /// Requests that will still have a fault.
    pub fn faults_left(&self) -> usize {
        self.state(|state| state.rules.iter().map(|(_, times, _)| times).sum())
    }

    /// Applies this fault alone to all requests whose target contains `part`. No request falls between the old and the new one.
    pub fn change_fault(&self, part: &str, fault: Fault) {
        self.state(|state| state.rules = vec![(part.to_owned(), usize::MAX, fault)]);
    }

    /// Ends all faults.
    pub fn clear_faults(&self) {
        self.state(|state| state.rules.clear());
    }

    /// Answers no request whose target contains `part` until [`TestRegistry::release`]; they are logged as they arrive.
    pub fn hold(&self, part: &str) {
        self.shared.held.send_modify(|held| held.push(part.to_owned()));
    }

    /// Answers everything that was held.
    pub fn release(&self) {
        self.shared.held.send_modify(Vec::clear);
    }

    /// Closes connections that begin with TLS, instead of answering in plain text.
    pub fn hang_up_on_tls(&self) {
        self.shared.hangs_up_on_tls.store(true, Ordering::Relaxed);
    }

    pub fn guard(&self, guard: Guard) {
        self.state(|state| state.guard = guard);
    }

    /// Answers wrong credentials with this status and no challenge.
    pub fn refuse_with(&self, code: u16) {
        self.state(|state| state.refusal = Some(code));
    }

    /// Makes every token issued so far worthless.
    pub fn revoke_tokens(&self) {
        self.state(|state| state.tokens.clear());
    }

    /// Tokens made by `issuer`; for another registry that checks them itself.
    pub fn issue_with(&self, issuer: Issuer) {
        self.state(|state| state.issuer = Some(Arc::new(issuer)));
    }

    /// Redirects blob requests to `storage`, over `hops` redirects, by URLs good for `uses` requests each that carry `query`.
    /// `storage` must be another one.
    pub fn redirect_blobs(&self, storage: &TestRegistry, uses: usize, query: &str, hops: usize) {
        let storage = Storage {
            shared: Arc::clone(&storage.shared),
            host: storage.host(),
            uses,
            query: query.to_owned(),
            hops,
        };
        self.state(|state| state.storage = Some(storage));
    }

    /// Redirects blob requests to `storage`, by this name if there is one.
    pub fn redirect_blobs_as(&self, storage: &TestRegistry, name: Option<&str>) {
        self.redirect_blobs(storage, usize::MAX, "", 1);
        if let Some(name) = name {
            let host = format!("{name}:{}", storage.address.port());
            self.state(|state| state.storage.as_mut().unwrap().host = host);
        }
    }

    /// Delays every answer, as a link with this round-trip time would.
    pub fn latency(&self, latency: Duration) {
        self.state(|state| state.latency = latency);
    }

    pub fn log(&self) -> Vec<Logged> {
        self.state(|state| state.log.clone())
    }

    /// Requests whose target contains `part`.
    pub fn count(&self, part: &str) -> usize {
        self.log().iter().filter(|logged| logged.target.contains(part)).count()
    }

    /// The log so far, which begins anew.
    pub fn take_log(&self) -> Vec<Logged> {
        self.state(|state| std::mem::take(&mut state.log))
    }

    pub fn clear_log(&self) {
        self.state(|state| state.log.clear());
    }

    fn state<T>(&self, body: impl FnOnce(&mut State) -> T) -> T {
        body(&mut self.shared.state.lock().unwrap())
    }
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, Arc::clone(&shared)));
        }
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    stream.set_nodelay(true).unwrap();
    let mut first = [0];
    // A TLS hello is answered as web servers do: in plain text.
    if matches!(stream.peek(&mut first).await, Ok(1) if first[0] == 0x16) {
        if shared.hangs_up_on_tls.load(Ordering::Relaxed) {
            return;
        }
        return wire::refuse_tls(&mut stream).await;
    }
    let connection = shared.connections.fetch_add(1, Ordering::Relaxed);
    let mut reader = BufReader::new(stream);
    while let Some(request) = wire::read_request(&mut reader).await {
        let (faults, answer, latency) = {
            let mut state = shared.state.lock().unwrap();
            let faults = take_faults(&mut state, &request);
            let answer = state.answer(&request, &Ranging::of(&faults));
            (faults, answer, state.latency)
        };
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        let (answer, sending) = distort(answer, &faults);
        {
            let mut state = shared.state.lock().unwrap();
            state.log.push(Logged {
                method: request.method.clone(),
                target: request.target.clone(),
                headers: request.headers.clone(),
                body: request.body.clone(),
                status: answer.status,
                sent: answer.body.len().min(sending.limit),
                connection,
            });
        }
        let mut held = shared.held.subscribe();
        let let_go = |held: &Vec<String>| !held.iter().any(|part| request.target.contains(part.as_str()));
        if held.wait_for(let_go).await.is_err() {
            return;
        }
        if !wire::send(reader.get_mut(), &request, &answer, &sending).await {
            return;
        }
    }
}
