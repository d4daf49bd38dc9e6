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
use super::error::{MountError, system};
use super::kernel;
use super::mountpoint::MountPoint;
use super::namespace;
use super::options::FuseOptions;
use super::overlay::{self, Upper};
use super::prefetch::{Prefetch, Side};
use super::process::process_start;
use super::registration::{MountRecord, RunDir, RunEntry};
use super::signals::Signals;
use super::stall::Stall;
use super::takedown;
use crate::content::Content;
use crate::fs::FsError;
use crate::fuse::Served;
use crate::image::{Image, Learning, Opening, Preparation, Unconfirmed};
use crate::layer::LayerContext;
use crate::os::{gone, private};
use crate::profile::Label;
use crate::task;

/// The image, the mount point, and how to mount.
#[derive(Debug, Clone)]
pub struct MountConfig {
    /// The image as the user wrote it.
    pub image: String,
    /// The mount point: the absolute path of a directory, without symlinks.
    pub mountpoint: PathBuf,
    /// The `-o` options.
    pub options: FuseOptions,
    /// The directories for changes, if the root is writable.
    pub upper: Option<Upper>,
    /// What to fetch although no reader asked for it.
    pub prefetch: Prefetch,
    /// The label of the profile: which of the image's programs will run.
    pub label: Label,
    /// Deadline of a read. With `None`, reads wait for ever.
    pub timeout: Option<Duration>,
    /// Whether the process gives up if the image cannot be prepared or the preparation stalls. Otherwise it serves
    /// errors.
    pub require_ready: bool,
    /// When this process started.
    pub started: Instant,
    /// Id of the process that started this one.
    pub parent: u32,
    /// The log file, if this is a background process. It gets its final name when the mount is registered.
    pub log: Option<PathBuf>,
}

/// An event in the life of a mount. `Mounted` comes first, then either `Ready` or `Failed`.
#[derive(Debug)]
pub enum Event {
    /// The mount point is mounted.
    Mounted,
    /// The process answers requests from the image.
    Ready(Arc<Image>),
    /// The process answers requests with this error.
    Failed(String),
}

/// How long `umount` waits for the last user to go after an unmount. The process serves these users for as long as
/// they need. A larger value delays `umount`; a smaller one makes it report users that are about to go.
const LINGER: Duration = Duration::from_secs(1);
/// Pause between two checks of a store that could not be written. A larger value delays caching after the store
/// recovers; a smaller one writes more to a store with trouble.
const STORE_LOOK: Duration = Duration::from_secs(2);
/// Bytes for which the store must have room to count as writable. A larger value leaves a nearly full store unused;
/// with a smaller one, the next writes would fail again.
const STORE_ROOM: u64 = 8 << 20;
/// Interval at which the mount checks whether the preparation of the image makes progress. A larger value delays
/// the errors of a stalled mount; a smaller one uses more processor time.
const LOOK: Duration = Duration::from_millis(100);
/// Time without useful bytes after which the status says that the preparation stalls, if reads wait for ever. A
/// larger value hides a stall for longer; a smaller one reports short ones.
const PATIENCE: Duration = Duration::from_secs(30);
/// Extra time before a stall ends the mount. A request to the registry that fails at the timeout also ends the
/// mount, and its error says more. With the extra time, that error comes first. A larger value delays the error of
/// a stall.
const MARGIN: Duration = Duration::from_millis(500);

/// Returns how long the mount may get no useful bytes before the preparation counts as stalled.
fn patience(config: &MountConfig) -> Duration {
    let patience = config.timeout.unwrap_or(PATIENCE);
    match config.require_ready {
        true => patience.saturating_add(MARGIN),
        false => patience,
    }
}

/// Mounts the image and serves it until it is unmounted. Reports progress to `events`.
pub async fn serve(
    config: MountConfig,
    context: LayerContext,
    opening: Opening,
    events: impl Fn(Event),
) -> Result<(), MountError> {
    // From here on a signal makes the process take down its mount, instead of killing it.
    let signals = Signals::catch(&[libc::SIGHUP]).map_err(system("handle signals"))?;
    let entry = RunDir::open()?.entry(&config.mountpoint);
    let turn = entry.turn().await?;
    entry.check_free()?;
    if let Some(dead) = entry.record()?.filter(|record| !record.is_alive()) {
        takedown::clear_now(&entry, &dead)?;
    }
    let directory = MountPoint::open(&config.mountpoint, config.options.nonempty).await?;
    let Opening {
        preparation,
        replay,
        unconfirmed,
    } = opening;
    let record = record(&config, &preparation, &entry);
    entry.register(&record, config.log.as_deref())?;
    let repository = preparation.repository();
    let learning = Learning::find(&context.store, preparation.resolved(), &repository, &config.label);
    let mut mount = Mount {
        side: Side::new(config.prefetch, &learning, replay),
        learning: Some(learning),
        content: None,
        served: Arc::default(),
        session: None,
        stall: Stall::new(patience(&config), Instant::now()),
        attached: Attached::new(entry, record, turn),
        directory: Some(directory),
        config,
        context,
        preparation,
        unconfirmed,
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

/// Checks at intervals, while the store cannot be written, whether it can be written again.
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

/// The channels to the clients that asked for the unmount and wait for the answer.
type Asked = Vec<oneshot::Sender<Response>>;

/// Sends the response to all clients that wait.
fn respond(asked: Asked, response: &Response) {
    for answer in asked {
        // A client that has gone away does not need the answer.
        let _ = answer.send(response.clone());
    }
}

/// Waits until `until`, when the clients of an unmount get their answer even if the session has not ended. Waits
/// for ever if it is `None`.
async fn lingered(until: Option<tokio::time::Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// A mount and its state in this process.
struct Mount {
    attached: Attached,
    /// The mount point. `None` as soon as the process mounts on it.
    directory: Option<MountPoint>,
    config: MountConfig,
    context: LayerContext,
    preparation: Arc<Preparation>,
    /// Since when and why the tag is unconfirmed, if it was resolved without its registry.
    unconfirmed: Option<Unconfirmed>,
    side: Side,
    /// The profile to learn. `None` once the image is ready.
    learning: Option<Learning>,
    content: Option<Arc<Content>>,
    /// The stage that decides what requests get.
    served: Arc<Served>,
    /// The open /dev/fuse. `None` once a session serves it.
    session: Option<OwnedFd>,
    /// Whether the preparation of the image makes progress.
    stall: Stall,
    image: Option<Arc<Image>>,
    failure: Option<Arc<FsError>>,
    /// Time from the start of the process until the image was mounted.
    mounted: Duration,
    /// Time from the start of the process until the image was ready.
    ready: Option<Duration>,
}

impl Mount {
    /// Prepares the image, serves it and answers clients, until the session ends or has to end. Returns the
    /// channels of the clients that wait for the answer to an unmount.
    async fn run(
        &mut self,
        mut requests: mpsc::Receiver<control::Call>,
        mut signals: Signals,
        events: impl Fn(Event),
    ) -> Result<Asked, MountError> {
        let (ended, mut session_end) = mpsc::channel(1);
        // The watcher runs only until the session starts. After that every request would wake it.
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
                // Another program unmounted it before a session started.
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

    /// Returns a future that completes when no process can reach the mount any more. For a foreground process, the
    /// parent counts as one that can.
    fn abandoned(&self) -> std::pin::Pin<Box<impl Future<Output = ()> + use<>>> {
        let device = self.attached.record.standing.as_ref().map(|s| s.device.clone());
        let parent = self.config.log.is_none().then_some(self.config.parent);
        Box::pin(namespace::abandoned(device, parent))
    }

    /// Mounts the image itself and returns the open /dev/fuse. Mounts it on the mount point if there is no overlay.
    /// Otherwise mounts it in the run directory, which only this user can reach.
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

    /// Opens the control socket and serves it. Requests go to `calls`.
    fn listen(&self, calls: mpsc::Sender<control::Call>) -> Result<Control, MountError> {
        let path = self.attached.entry.socket();
        gone(std::fs::remove_file(&path)).map_err(system("replace a dead control socket"))?;
        let listener = UnixListener::bind(&path).map_err(system("open the control socket"))?;
        private::restrict(&path).map_err(system("restrict the control socket"))?;
        Ok(Control::serve(listener, calls))
    }

    /// Puts the overlay on the mount point and unmounts the image's own mount. Returns `false`, and does nothing,
    /// for a mount that is not writable.
    async fn attach_overlay(&mut self) -> Result<bool, MountError> {
        let Some(upper) = self.config.upper.clone() else {
            return Ok(false);
        };
        let lower = self.attached.record.lower.clone();
        let directory = self.directory.take().ok_or_else(replaced)?;
        let options = self.config.options.clone();
        let mounting = task::blocking(move || {
            let target = directory.handle();
            let lock = overlay::mount(&lower, &upper, &target, directory.path(), &options)?;
            Ok::<_, MountError>((lock, directory.place()?))
        });
        let mounted = mounting.await.map_err(io::Error::other);
        let (lock, place) = mounted.map_err(system("mount the overlay"))??;
        self.attached.cover(place, lock)?;
        Ok(true)
    }

    /// Answers a request. If it is an unmount that succeeded, returns the channel instead: the caller answers when
    /// everything is taken down.
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
        // A client that has gone away does not need the answer.
        let _ = answer.send(response);
        None
    }
}

/// Returns the record that registers this mount.
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

/// Returns the error for a mount point that is gone or replaced by the time it is used.
fn replaced() -> MountError {
    system("find the mount point")(io::ErrorKind::NotFound.into())
}
