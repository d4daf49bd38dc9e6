//! The runtime of a command that fetches, and how a signal ends that command.
//!
//! Ctrl-C ends a command at the point where it waits. Partial output under a temporary name is removed. Layer data
//! that has arrived stays in the store. The exit status is 128 plus the number of the signal, as for a program that
//! the signal killed.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::libc;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use super::units::human;
use ocifs::image::Preparation;
use ocifs::layer::kept_of_layer;
use ocifs::mount::Signals;
use ocifs::store::Store;

/// Time that a command may take to end after a signal. It may be reading from a dead disk, waiting for a lock of a
/// stopped process, or writing to a program that does not read. A shorter time could lose data that is being written;
/// a longer one would keep the user waiting.
const GRACE: Duration = Duration::from_secs(2);

/// The error of a command that a signal ended.
#[derive(Debug, thiserror::Error)]
#[error("interrupted{}", outcome.as_deref().map(|text| format!(": {text}")).unwrap_or_default())]
pub(super) struct Interrupted {
    signal: i32,
    /// What the command leaves behind, for the user.
    outcome: Option<String>,
}

impl Interrupted {
    pub(super) fn new(signal: i32, outcome: Option<String>) -> Self {
        Self { signal, outcome }
    }

    /// Returns the exit status that shells show for a program killed by the signal.
    pub(super) fn exit_status(&self) -> u8 {
        status_of(self.signal)
    }
}

fn status_of(signal: i32) -> u8 {
    128 + u8::try_from(signal).unwrap_or(0)
}

/// Catches the signals that end a command: SIGINT, SIGTERM and SIGHUP. A signal that the process was started to
/// ignore stays ignored.
pub(super) fn signals() -> std::io::Result<Signals> {
    Signals::catch(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])
}

/// A runtime and the signal that ended its work, if any.
pub(super) struct Fetching {
    runtime: Option<Runtime>,
    /// The signal that has arrived, if any. Set from the first [`Fetching::run`] on: before it there is nothing to
    /// interrupt.
    signalled: OnceLock<watch::Receiver<Option<i32>>>,
    /// The image whose layers are being fetched.
    image: OnceLock<(Store, Arc<Preparation>)>,
}

impl Fetching {
    /// Starts a runtime with one worker for each core, and at least two. Decoding is the only heavy work on the
    /// runtime. With two workers, one can decode while the other keeps the network busy.
    pub(super) fn new() -> anyhow::Result<Self> {
        let workers = std::thread::available_parallelism().map_or(2, |n| n.get().max(2));
        let mut builder = Builder::new_multi_thread();
        let runtime = builder
            .worker_threads(workers)
            .thread_name("ocifs")
            .enable_all()
            .build()?;
        Ok(Self {
            runtime: Some(runtime),
            signalled: OnceLock::new(),
            image: OnceLock::new(),
        })
    }

    /// Returns the runtime.
    pub(super) fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("there until it is dropped")
    }

    /// Runs `work`. If a signal arrives first, drops `work` and returns [`Interrupted`].
    pub(super) fn run<T, E: Into<anyhow::Error>>(&self, work: impl Future<Output = Result<T, E>>) -> anyhow::Result<T> {
        let mut signalled = match self.signalled.get() {
            Some(signalled) => signalled.clone(),
            None => {
                let _entered = self.runtime().enter();
                let caught = signals()?;
                self.signalled.get_or_init(|| watch(self.runtime(), caught)).clone()
            }
        };
        self.runtime().block_on(async {
            let interrupted = async {
                match signalled.wait_for(Option::is_some).await {
                    Ok(signal) => signal.unwrap_or(libc::SIGTERM),
                    Err(_) => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                signal = interrupted => Err(Interrupted::new(signal, None).into()),
                result = work => result.map_err(Into::into),
            }
        })
    }

    /// Remembers the image whose layers are fetched from here on, for the message after a signal.
    pub(super) fn begin(&self, store: &Store, preparation: &Arc<Preparation>) {
        self.image.get_or_init(|| (store.clone(), preparation.clone()));
    }

    /// Ends the runtime and returns `result`. If a signal ended the command, the error says what the store keeps.
    pub(super) fn end(mut self, result: anyhow::Result<()>) -> anyhow::Result<()> {
        let signal = self.signalled.get().and_then(|signal| *signal.borrow());
        let (Err(_), Some(signal)) = (&result, signal) else {
            return result;
        };
        self.finish_writing();
        let outcome = self.image.get().map(|(store, preparation)| kept(store, preparation));
        Err(Interrupted::new(signal, outcome).into())
    }

    /// Gives writes that are under way up to [`GRACE`] to reach the disk.
    fn finish_writing(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(GRACE);
        }
    }

    /// Ends the runtime without waiting for its tasks.
    pub(super) fn abandon(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.finish_writing();
    }
}

/// Waits for a signal while the command runs. Ends the process if the command does not end within [`GRACE`], or at
/// the second signal.
fn watch(runtime: &Runtime, mut signals: Signals) -> watch::Receiver<Option<i32>> {
    let (sender, receiver) = watch::channel(None);
    runtime.spawn(async move {
        let signal = signals.next().await;
        sender.send_replace(Some(signal));
        tokio::select! {
            () = tokio::time::sleep(GRACE) => {}
            _ = signals.next() => {}
        }
        eprintln!("ocifs: interrupted");
        std::process::exit(status_of(signal).into());
    });
    receiver
}

/// Describes what the store has of an image.
fn kept(store: &Store, preparation: &Preparation) -> String {
    let (mut whole, mut bytes) = (0, 0);
    let layers = preparation.resolved().layers();
    for layer in layers {
        let kept = kept_of_layer(store, &layer.digest);
        whole += usize::from(kept.is_whole);
        bytes += kept.bytes;
    }
    let total = layers.len();
    let next = if bytes > 0 {
        "; the next pull goes on from there"
    } else {
        ""
    };
    format!("{whole} of {total} layers, {} kept{next}", human(bytes))
}
