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
use crate::image::Preparation;
use crate::layer::kept_of_layer;
use crate::mount::Signals;
use crate::store::Store;

/// How long a command may take to end, whatever it does at the moment: it may be reading from a dead disk, waiting for a lock
/// that a stopped process holds, or writing to a program that does not read.
const GRACE: Duration = Duration::from_secs(2);

/// A signal asked the command to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted{}", outcome.as_deref().map(|text| format!(": {text}")).unwrap_or_default())]
pub(super) struct Interrupted {
    signal: i32,
    /// What there is now.
    outcome: Option<String>,
}

impl Interrupted {
    pub(super) fn new(signal: i32, outcome: Option<String>) -> Self {
        Self { signal, outcome }
    }

    /// The exit status of a program that the signal killed, as shells show it.
    pub(super) fn exit_status(&self) -> u8 {
        status_of(self.signal)
    }
}

fn status_of(signal: i32) -> u8 {
    128 + u8::try_from(signal).unwrap_or(0)
}

/// The signals that end a command, but for those that it was started to ignore.
pub(super) fn signals() -> std::io::Result<Signals> {
    Signals::catch(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])
}

/// A runtime, and whether a signal came.
pub(super) struct Fetching {
    runtime: Option<Runtime>,
    /// The signal, from the moment on that there is something to interrupt.
    signalled: OnceLock<watch::Receiver<Option<i32>>>,
    /// The image whose layers are fetched.
    image: OnceLock<(Store, Arc<Preparation>)>,
}

impl Fetching {
    /// Decoding is the only real work done on the runtime, so it has as many workers as there are cores, at least two: one waits
    /// for a decode while the other keeps the network busy.
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

    /// The runtime.
    pub(super) fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("there until it is dropped")
    }

    /// Does `work`, until a signal comes.
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

    /// Takes note of the image whose layers are fetched from now on.
    pub(super) fn begin(&self, store: &Store, preparation: &Arc<Preparation>) {
        self.image.get_or_init(|| (store.clone(), preparation.clone()));
    }

    /// Ends; if a signal was the reason, the error says what is kept.
    pub(super) fn end(mut self, result: anyhow::Result<()>) -> anyhow::Result<()> {
        let signal = self.signalled.get().and_then(|signal| *signal.borrow());
        let (Err(_), Some(signal)) = (&result, signal) else {
            return result;
        };
        self.finish_writing();
        let outcome = self.image.get().map(|(store, preparation)| kept(store, preparation));
        Err(Interrupted::new(signal, outcome).into())
    }

    /// What is being written gets to the disk, if that does not take too long.
    fn finish_writing(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(GRACE);
        }
    }

    /// Ends without waiting for anything.
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

/// Waits for signals beside the command, and ends the process if the command does not notice.
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

/// What the store has of an image.
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
