//! The process behind a mount or a disk.

mod report;
mod stage;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use super::attached::Attached;
use super::attachment::directory::{AttachOptions, DirectoryAttachment};
use super::attachment::disk::DiskAttachment;
use super::attachment::{Attachment, ImageStage};
use super::control::{self, Control, Request, Response};
use super::doors::DiskDoors;
use super::error::{MountError, system};
use super::metrics::{Exporter, MetricsPlace};
use super::mountpoint::MountPoint;
use super::options::{FuseOptions, Via};
use super::overlay::Upper;
use super::prefetch::{Prefetch, Side};
use super::process::process_start;
use super::registration::{AttachPhase, Carrier, MountRecord, RunDir, RunEntry};
use super::signals::Signals;
use super::stall::Stall;
use super::summary::RunSummary;
use super::takedown;
use crate::content::Content;
use crate::fs::FsError;
use crate::fuse::Access;
use crate::image::{Image, Learning, Opening, Preparation, Unconfirmed};
use crate::layer::LayerContext;
use crate::os::{gone, private};
use crate::profile::Label;

/// A directory to mount an image on.
#[derive(Debug, Clone)]
pub struct DirectoryConfig {
    /// The mount point: the absolute path of a directory, without symlinks.
    pub mountpoint: PathBuf,
    /// The `-o` options.
    pub options: FuseOptions,
    /// The directories for changes, if the root is writable.
    pub upper: Option<Upper>,
    /// What serves the tree.
    pub via: Via,
}

impl DirectoryConfig {
    /// Checks that the carrier and the options fit together. [`serve`] does so too.
    pub fn check(&self) -> Result<(), MountError> {
        match self.via == Via::Erofs && !self.options.allow_other {
            true => Err(MountError::OpenToAll),
            false => Ok(()),
        }
    }
}

/// How an image is served.
#[derive(Debug, Clone)]
pub enum Shape {
    /// As a directory tree.
    Directory(DirectoryConfig),
    /// As a disk with these doors, at least one.
    Disk(DiskDoors),
}

impl Shape {
    /// Whether all readers are the kernel, which keeps what it reads. The clients of a socket may keep nothing.
    fn is_read_by_the_kernel_alone(&self) -> bool {
        match self {
            Self::Directory(_) => true,
            Self::Disk(doors) => doors.nbd.is_none() && doors.vhost_user_blk.is_none(),
        }
    }

    /// The places at which other commands find it. The first one names the registration.
    fn places(&self) -> Vec<PathBuf> {
        match self {
            Self::Directory(directory) => vec![directory.mountpoint.clone()],
            Self::Disk(doors) => doors.places(),
        }
    }
}

/// The image, and how to serve it.
#[derive(Debug, Clone)]
pub struct MountConfig {
    /// The image as the user wrote it.
    pub image: String,
    /// How the image is served.
    pub shape: Shape,
    /// What to fetch although no reader asked for it.
    pub prefetch: Prefetch,
    /// The label of the profile: which of the image's programs will run.
    pub label: Label,
    /// Where the figures of the mount go, if they go anywhere.
    pub metrics: Option<MetricsPlace>,
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

/// An event in the life of a mount. `Attached` comes first, then either `Ready` or `Failed`, and `Ending` last.
#[derive(Debug)]
pub enum Event {
    /// The mount point is mounted, or the doors of the disk are open.
    Attached,
    /// The process answers requests from the image.
    Ready(Arc<Image>),
    /// The process answers requests with this error.
    Failed(String),
    /// The process takes everything down and ends.
    Ending,
}

/// How long `umount` waits for the last user to go after an unmount. The process serves these users for as long as
/// they need. A larger value delays `umount`; a smaller one makes it report users that are about to go.
const LINGER: Duration = Duration::from_secs(1);
/// How long an unmount waits for clients that are about to go. A larger value delays the refusal while clients stay; a
/// smaller one refuses right after the end of a virtual machine.
const GOING: Duration = Duration::from_millis(300);
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
    if let Shape::Directory(directory) = &config.shape {
        directory.check()?;
    }
    // From here on a signal makes the process take down its mount, instead of killing it.
    let signals = Signals::catch(&[libc::SIGHUP]).map_err(system("handle signals"))?;
    let exporter = match &config.metrics {
        Some(place) => Some(Exporter::open(place).await?),
        None => None,
    };
    let run = RunDir::open()?;
    let places = config.shape.places();
    let entry = run.entry(&places[0]);
    let turn = entry.turn().await?;
    match &config.shape {
        Shape::Directory(_) => entry.check_free()?,
        // Its places may be those of any other disk.
        Shape::Disk(_) => entry.check_places(&places)?,
    }
    if let Some(dead) = entry.record()?.filter(|record| !record.is_alive()) {
        takedown::clear_now(&entry, &dead)?;
    }
    let Opening {
        preparation,
        replay,
        unconfirmed,
    } = opening;
    let learning = Learning::find(
        &context.store,
        preparation.resolved(),
        &preparation.repository(),
        &config.label,
    );
    let attachment = plan(&config, &context, &preparation, entry, turn).await?;
    let mut mount = Mount {
        metrics: exporter.as_ref().map(Exporter::place),
        attachment,
        side: Side::new(config.prefetch, &learning, replay),
        learning: Some(learning),
        content: None,
        stall: Stall::new(patience(&config), Instant::now()),
        config,
        context,
        preparation,
        unconfirmed,
        image: None,
        failure: None,
        began: Instant::now(),
        mounted: None,
        ready: None,
    };
    let looking = tokio::spawn(look_after_store(mount.context.clone()));
    let (calls, requests) = mpsc::channel(4);
    let exporting = exporter.map(|exporter| exporter.start(calls.clone()));
    let control = mount.listen(calls)?;
    let asked = mount.run(requests, signals, &events).await;
    events(Event::Ending);
    looking.abort();
    mount.side.stop().await;
    let last = mount.status();
    if let Some(exporting) = exporting {
        exporting.end(&last).await;
    }
    let asked = asked?;
    mount.attachment.take_down()?;
    let summary = Some(Box::new(RunSummary::from(&last)));
    respond(asked, &Response::Unmounted { summary });
    control.close().await;
    Ok(())
}

/// Registers the process, and plans how it attaches the image.
async fn plan(
    config: &MountConfig,
    context: &LayerContext,
    preparation: &Preparation,
    entry: RunEntry,
    turn: File,
) -> Result<Box<dyn Attachment>, MountError> {
    let record = record(config, preparation, &entry);
    let register = |record| entry.register(record, config.log.as_deref());
    let (source, parent) = (config.image.clone(), config.log.is_none().then_some(config.parent));
    match &config.shape {
        Shape::Directory(directory) => {
            let mountpoint = MountPoint::open(&entry.run(), &directory.mountpoint, directory.options.nonempty).await?;
            register(&record)?;
            let via = via(config, directory, context, preparation);
            let options = AttachOptions {
                source,
                fuse: directory.options.clone(),
                upper: directory.upper.clone(),
                parent,
                via,
            };
            // FUSE is mounted at once. For EROFS, the registration holds the place until the image is ready.
            let at_once = via == Via::Fuse;
            let attached = Attached::new(entry, record, at_once.then_some(turn));
            let mut attachment = DirectoryAttachment::new(options, attached, mountpoint);
            if at_once {
                attachment.enter(ImageStage::Preparing).await?;
            }
            Ok(Box::new(attachment))
        }
        Shape::Disk(doors) => {
            let directory = match &doors.file {
                Some(path) => Some(MountPoint::open(&entry.run(), path, false).await?),
                None => None,
            };
            register(&record)?;
            let config = Arc::from(&preparation.resolved().config_document.bytes[..]);
            let attached = Attached::new(entry, record, None);
            let doors = doors.clone();
            Ok(Box::new(DiskAttachment::new(
                source, doors, directory, config, parent, attached,
            )))
        }
    }
}

/// Returns the carrier that was asked for, with [`Via::Auto`] narrowed to [`Via::Fuse`] where only FUSE can serve the tree.
fn via(config: &MountConfig, directory: &DirectoryConfig, context: &LayerContext, preparation: &Preparation) -> Via {
    if directory.via != Via::Auto {
        return directory.via;
    }
    let soon = config.require_ready || preparation.is_in_store(context);
    // EROFS cannot keep other users out.
    let open = directory.options.access() == Access::Everybody;
    match soon && open && nix::unistd::geteuid().is_root() {
        true => Via::Auto,
        false => Via::Fuse,
    }
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
type UnmountReplies = Vec<oneshot::Sender<Response>>;

/// Sends the response to all clients that wait.
fn respond(asked: UnmountReplies, response: &Response) {
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
    attachment: Box<dyn Attachment>,
    config: MountConfig,
    /// Where the figures of the mount go.
    metrics: Option<String>,
    context: LayerContext,
    preparation: Arc<Preparation>,
    /// Since when and why the tag is unconfirmed, if it was resolved without its registry.
    unconfirmed: Option<Unconfirmed>,
    side: Side,
    /// The profile to learn. `None` once the image is ready.
    learning: Option<Learning>,
    content: Option<Arc<Content>>,
    /// Whether the preparation of the image makes progress.
    stall: Stall,
    image: Option<Arc<Image>>,
    failure: Option<Arc<FsError>>,
    /// When the preparation of the image began.
    began: Instant,
    /// Time from the start of the process until the image was attached.
    mounted: Option<Duration>,
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
    ) -> Result<UnmountReplies, MountError> {
        let mut prepares = true;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut asked = UnmountReplies::new();
        let mut linger = None;
        let (preparation, context) = (self.preparation.clone(), self.context.clone());
        let mut preparing = std::pin::pin!(preparation.finish(&context));
        // The outcome of the preparation, until it is reported: after the attachment.
        let mut outcome = None;
        loop {
            if self.mounted.is_none() && self.attachment.is_attached() {
                self.mounted = Some(self.config.started.elapsed());
                events(Event::Attached);
            }
            if let Some(event) = outcome.take() {
                events(event);
            }
            tokio::select! {
                prepared = &mut preparing, if prepares => {
                    prepares = false;
                    outcome = Some(self.prepared(prepared).await?);
                }
                _ = look.tick(), if prepares => self.look().await?,
                Some((request, answer)) = requests.recv() => {
                    if request == (Request::Unmount { lazy: false }) {
                        // A client that has just ended may still count.
                        let _ = tokio::time::timeout(GOING, self.attachment.unused()).await;
                    }
                    let Some(answer) = self.answer(request, answer) else { continue };
                    asked.push(answer);
                    if !self.attachment.is_served() {
                        return Ok(asked);
                    }
                    // The session ends by itself when the last user of the mount is gone. Until then it serves
                    // these users. The background tasks stop, because there will be no new readers.
                    self.side.stop().await;
                    linger.get_or_insert_with(|| tokio::time::Instant::now() + LINGER);
                }
                () = lingered(linger) => {
                    // The kernel may be about to take the file system down, which ends the session.
                    let is_unmounting = self.attachment.attached().unfinished().any();
                    linger = is_unmounting.then(|| tokio::time::Instant::now() + LINGER);
                    if !is_unmounting {
                        let summary = Some(Box::new(RunSummary::from(&self.status())));
                        respond(std::mem::take(&mut asked), &Response::Detached { summary });
                    }
                }
                () = self.attachment.ended() => return Ok(asked),
                _ = signals.next() => return Ok(asked),
            }
        }
    }

    /// Opens the control socket and serves it. Requests go to `calls`.
    fn listen(&self, calls: mpsc::Sender<control::Call>) -> Result<Control, MountError> {
        let path = self.attachment.attached().entry.socket();
        gone(std::fs::remove_file(&path)).map_err(system("replace a dead control socket"))?;
        let listener = UnixListener::bind(&path).map_err(system("open the control socket"))?;
        private::restrict(&path).map_err(system("restrict the control socket"))?;
        Ok(Control::serve(listener, calls))
    }

    /// Answers a request. If it is an unmount that succeeded, returns the channel instead: the caller answers when
    /// everything is taken down.
    fn answer(&mut self, request: Request, answer: oneshot::Sender<Response>) -> Option<oneshot::Sender<Response>> {
        let response = match request {
            Request::Status => Response::Status(Box::new(self.status())),
            Request::Unmount { lazy } => match self.attachment.detach(lazy) {
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
    let mountpoint = config.shape.places().swap_remove(0);
    let upper = match &config.shape {
        Shape::Directory(directory) => directory.upper.as_ref(),
        Shape::Disk(_) => None,
    };
    MountRecord {
        pid,
        started: process_start(pid).unwrap_or(0),
        image: config.image.clone(),
        digest: preparation.resolved().manifest_document.digest.to_string(),
        lower: match upper {
            Some(_) => entry.lower(),
            None => mountpoint.clone(),
        },
        mountpoint,
        writable: upper.is_some(),
        scratch: match upper {
            Some(Upper::Private(scratch)) => Some(scratch.clone()),
            _ => None,
        },
        standing: None,
        carrier: Carrier::Fuse,
        disk_mount: None,
        disk: match &config.shape {
            Shape::Directory(_) => None,
            Shape::Disk(doors) => Some(doors.clone()),
        },
        phase: AttachPhase::Pending,
    }
}
