//! An in-process registry that misbehaves on request.
//!
//! A small HTTP/1.1 server on a thread of its own. It serves manifests by tag and digest, blobs with ranges, tags,
//! and a token server. It can also be the "storage" that redirects lead to. It logs every request, and applies faults
//! to the requests whose path contains a given text. All repositories share the blobs. Tests that mount use it like a
//! real registry: `registry.host()`.
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

/// Credentials that a client must show.
#[derive(Debug, Clone, Default)]
pub enum Guard {
    /// Nothing.
    #[default]
    Open,
    /// User and password.
    Basic(String, String),
    /// A token from this server's `/token`.
    Bearer(Tokens),
}

/// How `/token` behaves.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// User and password that `/token` requires, if any.
    pub login: Option<(String, String)>,
    /// Refresh token that `/token` accepts by POST, if any.
    pub identity: Option<String>,
    /// Number of requests for which a token is valid.
    pub uses: usize,
    /// `expires_in` of the answers.
    pub expires_in: u64,
    /// Realm that the challenge names, if it is another server.
    pub realm: Option<String>,
    /// Whether only the 401 for `/v2/` has a challenge.
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

/// A request and how it was answered.
#[derive(Debug, Clone)]
pub struct Logged {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    pub body: String,
    pub status: u16,
    /// Bytes of the body that were sent.
    pub sent: usize,
    /// Number of the connection of the request.
    pub connection: usize,
}

/// Makes the token for a scope, instead of the built-in issuer.
pub type Issuer = Box<dyn Fn(&str) -> String + Send + Sync>;

struct Shared {
    state: Mutex<State>,
    connections: AtomicUsize,
    /// Whether the server closes the connection after a TLS hello.
    hangs_up_on_tls: AtomicBool,
    /// Texts in the targets of requests that are held: they get no answer for now.
    held: watch::Sender<Vec<String>>,
}

/// The registry. Dropping it stops the server.
pub struct TestRegistry {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl TestRegistry {
    /// Listens on an ephemeral loopback port. The registry is ready when the function returns.
    pub fn start() -> Self {
        Self::start_at("127.0.0.1:0")
    }

    /// Listens at an address of this machine. Port 0 is an ephemeral port.
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

    /// Returns the address, as `127.0.0.1:port`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn add_blob(&self, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.state(|state| state.blobs.insert(digest.to_string(), bytes));
        digest
    }

    /// Sends these bytes for the blob with this digest from now on.
    pub fn replace_blob(&self, digest: &Digest, bytes: impl Into<Vec<u8>>) {
        self.state(|state| state.blobs.insert(digest.to_string(), bytes.into()));
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

    /// Adds config, layers and manifest of a Linux image for this machine's processor. Returns the manifest's digest.
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

    /// Returns the number of requests that will still get a fault.
    pub fn faults_left(&self) -> usize {
        self.state(|state| state.rules.iter().map(|(_, times, _)| times).sum())
    }

    /// Applies this fault alone to all requests whose target contains `part`. No request falls between the old and the new one.
    pub fn change_fault(&self, part: &str, fault: Fault) {
        self.state(|state| state.rules = vec![(part.to_owned(), usize::MAX, fault)]);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.state(|state| state.rules.clear());
    }

    /// Holds all requests whose target contains `part` until [`TestRegistry::release`]. They are logged as they
    /// arrive.
    pub fn hold(&self, part: &str) {
        self.shared.held.send_modify(|held| held.push(part.to_owned()));
    }

    /// Answers all held requests.
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

    /// Invalidates every token issued so far.
    pub fn revoke_tokens(&self) {
        self.state(|state| state.tokens.clear());
    }

    /// Makes tokens with `issuer`, for another registry that checks them itself.
    pub fn issue_with(&self, issuer: Issuer) {
        self.state(|state| state.issuer = Some(Arc::new(issuer)));
    }

    /// Redirects blob requests to `storage`, over `hops` redirects. Each URL is valid for `uses` requests and carries
    /// `query`. `storage` must be another registry.
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

    /// Redirects blob requests to `storage`, under this host name if there is one.
    pub fn redirect_blobs_as(&self, storage: &TestRegistry, name: Option<&str>) {
        self.redirect_blobs(storage, usize::MAX, "", 1);
        if let Some(name) = name {
            let host = format!("{name}:{}", storage.address.port());
            self.state(|state| state.storage.as_mut().unwrap().host = host);
        }
    }

    /// Delays every answer like a link with this round-trip time.
    pub fn latency(&self, latency: Duration) {
        self.state(|state| state.latency = latency);
    }

    pub fn log(&self) -> Vec<Logged> {
        self.state(|state| state.log.clone())
    }

    /// Returns the number of requests whose target contains `part`.
    pub fn count(&self, part: &str) -> usize {
        self.log().iter().filter(|logged| logged.target.contains(part)).count()
    }

    /// Returns the log and empties it.
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
    // Web servers answer a TLS hello in plain text.
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
                body: request.text(),
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
