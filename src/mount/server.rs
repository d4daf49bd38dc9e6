//! The process behind a mount.

mod report;
mod stage;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use super::attached::Attached;
use super::control::{self, Control, Request, Response};
use super::kernel::{self, KernelMountError};
use super::mountpoint::MountPoint;
use super::namespace;
use super::options::FuseOptions;
use super::overlay::{self, OverlayError, Upper};
use super::prefetch::{Prefetch, Side};
use super::private;
use super::process::process_start;
use super::registration::{MountRecord, RegistrationError, RunDir, RunEntry};
use super::signals::Signals;
use super::stall::Stall;
use super::takedown::{self, TakedownError};
use crate::fs::{FsError, Reads};
use crate::fuse::Served;
use crate::image::{Image, ImageError, Learning, Preparation, Replay, Unconfirmed};
use crate::layer::LayerContext;
use crate::profile::Label;
use crate::store::gone;

/// What to mount where.
#[derive(Debug, Clone)]
pub struct MountConfig {
    /// The image as the user wrote it.
    pub image: String,
    /// Absolute path of a directory, without symlinks.
    pub mountpoint: PathBuf,
    /// `-o` options.
    pub options: FuseOptions,
    /// Where changes go, for a writable root.
    pub upper: Option<Upper>,
    /// What to fetch that nobody asked for.
    pub prefetch: Prefetch,
    /// Which of the image's programs will run.
    pub label: Label,
    /// If the image's tag was resolved without its registry: since when, and why.
    pub unconfirmed: Option<Unconfirmed>,
    /// Deadline of a read; none is for ever.
    pub timeout: Option<Duration>,
    /// Give up, instead of serving errors, if the image cannot be prepared.
    pub require_ready: bool,
    /// When the program started.
    pub started: Instant,
    /// The process that started this one.
    pub parent: u32,
    /// The log file of a process in the background, which gets its name when the mount is registered.
    pub log: Option<PathBuf>,
}

/// What happens to a mount, in this order.
#[derive(Debug)]
pub enum Event {
    /// The directory is mounted.
    Mounted,
    /// Requests are answered.
    Ready(Arc<Image>),
    /// Requests are answered with errors, because of this.
    Failed(String),
}

/// Why a mount did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The mount point cannot be used.
    #[error("cannot mount on {}: {reason}", mountpoint.display())]
    Mountpoint {
        /// Where.
        mountpoint: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] KernelMountError),
    /// The overlay failed.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The run directory failed.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// What a dead process left at the mount point does not go away.
    #[error("cannot clear a dead mount: {0}")]
    Takedown(#[from] TakedownError),
    /// The image could not be prepared.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Nothing useful came for too long.
    #[error(transparent)]
    Stalled(FsError),
    /// Signals, sockets, threads.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

pub(super) fn system(action: &'static str) -> impl Fn(io::Error) -> MountError {
    move |source| MountError::System { action, source }
}

/// Others may still use the mount after an unmount. They are served on, but `umount` waits no longer than this for their end.
const LINGER: Duration = Duration::from_secs(1);
/// How often a store that could not be written is looked at, and how many bytes it must have room for.
const STORE_LOOK: Duration = Duration::from_secs(2);
const STORE_ROOM: u64 = 8 << 20;
/// How often one looks whether the image comes on that is being prepared.
const LOOK: Duration = Duration::from_millis(100);
/// How long nothing useful may come before that is said, where reads wait for ever.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a request that fails gets beside that where its error ends the mount, since it says more.
const MARGIN: Duration = Duration::from_millis(500);

/// How long nothing useful may come.
fn patience(config: &MountConfig) -> Duration {
    let patience = config.timeout.unwrap_or(PATIENCE);
    match config.require_ready {
        true => patience.saturating_add(MARGIN),
        false => patience,
    }
}

/// Mounts and serves until unmounted. `events` hears how it goes.
pub async fn serve(
    config: MountConfig,
    context: LayerContext,
    preparation: Arc<Preparation>,
    replay: Option<Replay>,
    events: impl Fn(Event),
) -> Result<(), MountError> {
    // From here on a signal takes down what stands, instead of killing the process.
    let signals = Signals::catch(&[libc::SIGHUP]).map_err(system("handle signals"))?;
    let entry = RunDir::open()?.entry(&config.mountpoint);
    let turn = entry.turn().await?;
    entry.check_free()?;
    if let Some(dead) = entry.record()?.filter(|record| !record.is_alive()) {
        takedown::clear_now(&entry, &dead)?;
    }
    let directory = MountPoint::open(&config.mountpoint, config.options.nonempty).await?;
    let record = record(&config, &preparation, &entry);
    entry.register(&record, config.log.as_deref())?;
    let repository = preparation.repository();
    let learning = Learning::find(&context.store, preparation.resolved(), &repository, &config.label);
    let mut mount = Mount {
        side: Side::new(config.prefetch, &learning, replay),
        learning: Some(learning),
        reads: None,
        served: Arc::default(),
        session: None,
        stall: Stall::new(patience(&config), Instant::now()),
        attached: Attached::new(entry, record, turn),
        directory: Some(directory),
        config,
        context,
        preparation,
        image: None,
        failure: None,
        mounted: Duration::ZERO,
        ready: None,
    };
    let fuse = mount.attach_lower()?;
    let looking = tokio::spawn(look_after_store(mount.context.clone()));
    mount.session = Some(fuse);
    mount.attached.turn = None;
    let (calls, requests) = mpsc::channel(4);
    let control = mount.listen(calls)?;
    mount.mounted = mount.config.started.elapsed();
    if mount.config.upper.is_none() {
        events(Event::Mounted);
    }
    let asked = mount.run(requests, signals, events).await;
    looking.abort();
    mount.side.stop().await;
    let asked = asked?;
    mount.attached.detach(true)?;
    mount.attached.unregister()?;
    mount.attached.discard();
    respond(asked, &Response::Unmounted);
    control.close().await;
    Ok(())
}

/// While the store cannot be written, looks every now and then whether it can again.
async fn look_after_store(context: LayerContext) {
    loop {
        context.health.store_trouble().await;
        tokio::time::sleep(STORE_LOOK).await;
        let store = context.store.clone();
        if let Ok(Ok(())) = tokio::task::spawn_blocking(move || store.probe(STORE_ROOM)).await {
            context.health.store_works();
        }
    }
}

/// Those who asked for the unmount and wait for their answer.
type Asked = Vec<oneshot::Sender<Response>>;

/// Answers all who asked.
fn respond(asked: Asked, response: &Response) {
    for answer in asked {
        // A client that went away does not need the answer.
        let _ = answer.send(response.clone());
    }
}

/// Waits for the end of the time that the session has to end after an unmount.
async fn lingered(until: Option<tokio::time::Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// A mount in one process.
struct Mount {
    attached: Attached,
    /// Until the mount that the user sees stands.
    directory: Option<MountPoint>,
    config: MountConfig,
    context: LayerContext,
    preparation: Arc<Preparation>,
    side: Side,
    /// Until there is an image to listen to.
    learning: Option<Learning>,
    reads: Option<Arc<Reads>>,
    /// What requests get.
    served: Arc<Served>,
    /// The open /dev/fuse, until a session serves it.
    session: Option<OwnedFd>,
    /// Whether the image still comes on.
    stall: Stall,
    image: Option<Arc<Image>>,
    failure: Option<Arc<FsError>>,
    mounted: Duration,
    ready: Option<Duration>,
}

impl Mount {
    /// Prepares, serves and answers until the session ends or has to. Returns those who wait for the answer to an unmount.
    async fn run(
        &mut self,
        mut requests: mpsc::Receiver<control::Call>,
        mut signals: Signals,
        events: impl Fn(Event),
    ) -> Result<Asked, MountError> {
        let (ended, mut session_end) = mpsc::channel(1);
        // Only until the session starts: a watcher would be woken for every request.
        let watched = self.session.as_ref().map(kernel::watch).transpose();
        let mut watched = watched.map_err(system("watch /dev/fuse"))?;
        let mut prepares = true;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut asked = Asked::new();
        let mut linger = None;
        let mut abandoned = self.abandoned();
        let (preparation, context) = (self.preparation.clone(), self.context.clone());
        let mut preparing = std::pin::pin!(preparation.finish(&context));
        loop {
            tokio::select! {
                prepared = &mut preparing, if prepares => {
                    prepares = false;
                    watched = None;
                    self.prepared(prepared)?;
                    self.start_session(&ended)?;
                    if self.attach_overlay().await? {
                        abandoned = self.abandoned();
                        events(Event::Mounted);
                    }
                    match (&self.image, &self.failure) {
                        (Some(image), _) => events(Event::Ready(image.clone())),
                        (None, Some(error)) => events(Event::Failed(error.to_string())),
                        (None, None) => {}
                    }
                }
                _ = look.tick(), if prepares => {
                    if self.look()? {
                        watched = None;
                        self.start_session(&ended)?;
                    }
                }
                Some((request, answer)) = requests.recv() => {
                    let Some(answer) = self.answer(request, answer) else { continue };
                    asked.push(answer);
                    if self.session.is_some() {
                        return Ok(asked);
                    }
                    // The session ends by itself when the last user of the mount is gone. Until then it serves
                    // these users. The background tasks stop, because there will be no new readers.
                    self.side.stop().await;
                    linger.get_or_insert_with(|| tokio::time::Instant::now() + LINGER);
                }
                () = lingered(linger) => {
                    linger = None;
                    respond(std::mem::take(&mut asked), &Response::Detached);
                }
                () = &mut abandoned => {
                    tracing::info!("the mount namespace has ended, nobody can reach the mount any more");
                    return Ok(asked);
                }
                _ = signals.next() => return Ok(asked),
                // Somebody else unmounted it before there was a session to end.
                () = kernel::gone(watched.as_ref()) => {
                    self.attached.forget_mounts();
                    return Ok(asked);
                }
                Some(result) = session_end.recv(), if self.session.is_none() => {
                    match result {
                        Ok(()) => {
                            tracing::info!("unmounted");
                            self.attached.forget_mounts();
                        }
                        Err(error) => tracing::error!(%error, "the FUSE session ended"),
                    }
                    return Ok(asked);
                }
            }
        }
    }

    /// The end of the mount namespace. Whoever runs a process in the foreground looks after it.
    fn abandoned(&self) -> std::pin::Pin<Box<impl Future<Output = ()> + use<>>> {
        let device = self.attached.record.standing.as_ref().map(|s| s.device.clone());
        let parent = self.config.log.is_none().then_some(self.config.parent);
        Box::pin(namespace::abandoned(device, parent))
    }

    /// Mounts the image itself, on the mount point or, for an overlay to come, where only this user reaches it.
    fn attach_lower(&mut self) -> Result<OwnedFd, MountError> {
        let lower = self.attached.record.lower.clone();
        let mount = |target: &Path| kernel::mount(&self.config.image, target, &lower, &self.config.options);
        if self.config.upper.is_some() {
            private::directory(&lower).map_err(system("create the directory below the overlay"))?;
            let fuse = mount(&lower)?;
            self.attached.add(&lower)?;
            return Ok(fuse);
        }
        let directory = self.directory.take().ok_or_else(replaced)?;
        let fuse = mount(&directory.handle())?;
        self.attached.add(&directory.place()?)?;
        if self.attached.record.standing.is_none() {
            return Err(replaced());
        }
        Ok(fuse)
    }

    fn listen(&self, calls: mpsc::Sender<control::Call>) -> Result<Control, MountError> {
        let path = self.attached.entry.socket();
        gone(std::fs::remove_file(&path)).map_err(system("replace a dead control socket"))?;
        let listener = UnixListener::bind(&path).map_err(system("open the control socket"))?;
        private::restrict(&path).map_err(system("restrict the control socket"))?;
        Ok(Control::serve(listener, calls))
    }

    /// Puts the overlay on the mount point, if one is wanted, and takes away the image's own mount.
    async fn attach_overlay(&mut self) -> Result<bool, MountError> {
        let Some(upper) = self.config.upper.clone() else {
            return Ok(false);
        };
        let lower = self.attached.record.lower.clone();
        let directory = self.directory.take().ok_or_else(replaced)?;
        let options = self.config.options.clone();
        let mounting = tokio::task::spawn_blocking(move || {
            let target = directory.handle();
            let lock = overlay::mount(&lower, &upper, &target, directory.path(), &options)?;
            Ok::<_, MountError>((lock, directory.place()?))
        });
        let (lock, place) = mounting
            .await
            .map_err(|e| system("mount the overlay")(io::Error::other(e)))??;
        self.attached.cover(place, lock)?;
        Ok(true)
    }

    /// Answers a request. The answer to an unmount that succeeded comes back, for when everything is gone.
    fn answer(&mut self, request: Request, answer: oneshot::Sender<Response>) -> Option<oneshot::Sender<Response>> {
        let response = match request {
            Request::Status => Response::Status(Box::new(self.status())),
            Request::Unmount { lazy } => match self.attached.detach(lazy) {
                Ok(()) => return Some(answer),
                Err(error) => Response::Failed {
                    message: error.to_string(),
                },
            },
        };
        // A client that went away does not need the answer.
        let _ = answer.send(response);
        None
    }
}

fn record(config: &MountConfig, preparation: &Preparation, entry: &RunEntry) -> MountRecord {
    let pid = std::process::id();
    MountRecord {
        pid,
        started: process_start(pid).unwrap_or(0),
        image: config.image.clone(),
        digest: preparation.resolved().manifest_document.digest.to_string(),
        mountpoint: config.mountpoint.clone(),
        lower: match config.upper {
            Some(_) => entry.lower(),
            None => config.mountpoint.clone(),
        },
        writable: config.upper.is_some(),
        scratch: match &config.upper {
            Some(Upper::Private(scratch)) => Some(scratch.clone()),
            _ => None,
        },
        standing: None,
    }
}

/// The mount point is gone by the time it is used.
fn replaced() -> MountError {
    system("find the mount point")(io::ErrorKind::NotFound.into())
}
