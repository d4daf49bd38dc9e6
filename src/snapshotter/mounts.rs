//! The mounts of images: one for each image and number of layers, whoever uses it.
//!
//! A process of its own serves each mount, as `ocifs mount` does. It belongs to no other process, so the snapshotter may
//! end, crash or be replaced while containers run. The next snapshotter finds the mounts by their directories.
//!
//! Invariants:
//! - At most one task at a time begins or ends the mount of a directory, and all who want the mount wait for that task.
//! - Nothing here touches a mount: a process that does not answer would keep this one waiting.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use tokio::process::Command;

use super::error::SnapshotError;
use super::record::ImageLayers;
use crate::mount::{MountState, RunDir, TakedownError, status_of, take_down};
use crate::oci::{Digest, Reference};
use crate::os::{gone, private, program};
use crate::task::joined;

/// Time between two looks at a mount that another process is making ready. A shorter time uses more processor time; a
/// longer one delays containers.
const LOOK: Duration = Duration::from_millis(50);

/// What a task did about a directory.
#[derive(Debug, Clone)]
enum Done {
    /// The image is served, or why it is not.
    Served(Result<(), String>),
    /// The mount was ended, or why it was not.
    Ended(Result<(), String>),
}

type MountTask = Shared<BoxFuture<'static, Done>>;

/// The mounts of images.
#[derive(Debug, Clone)]
pub struct SharedMounts(Arc<Shelf>);

#[derive(Debug)]
struct Shelf {
    directory: PathBuf,
    program: PathBuf,
    arguments: Vec<OsString>,
    run: RunDir,
    tasks: Mutex<HashMap<PathBuf, MountTask>>,
    /// When somebody wanted a mount last.
    wanted: Mutex<HashMap<PathBuf, Instant>>,
}

impl SharedMounts {
    /// Mounts images below `directory`, with `program`, which is an ocifs, and further arguments for its `mount`.
    pub fn open(directory: PathBuf, program: PathBuf, arguments: Vec<OsString>) -> Result<Self, SnapshotError> {
        private::directory(&directory).map_err(SnapshotError::io(&directory))?;
        let run = RunDir::open().map_err(|error| SnapshotError::Argument(error.to_string()))?;
        Ok(Self(Arc::new(Shelf {
            directory,
            program,
            arguments,
            run,
            tasks: Mutex::default(),
            wanted: Mutex::default(),
        })))
    }

    /// Returns where an image is mounted.
    pub fn path(&self, image: &ImageLayers) -> PathBuf {
        let name = format!("{}{}", prefix(&image.manifest), image.layers);
        self.0.directory.join(name)
    }

    /// Mounts an image, if it is not mounted, and waits until it can be read. Returns where.
    pub async fn serve(&self, image: &ImageLayers) -> Result<PathBuf, SnapshotError> {
        let path = self.path(image);
        self.0.wanted().insert(path.clone(), Instant::now());
        loop {
            let (shelf, wanted, at) = (self.0.clone(), image.clone(), path.clone());
            let work = async move { Done::Served(shelf.serve(&wanted, &at).await) };
            match self.task(&path, work).await {
                Done::Served(Ok(())) => return Ok(path),
                Done::Served(Err(reason)) => {
                    return Err(SnapshotError::Image {
                        image: format!("{}@{}", image.reference, image.manifest),
                        reason,
                    });
                }
                // It is mounted again at once.
                Done::Ended(_) => {}
            }
        }
    }

    /// Returns the directories of all images, mounted or not, with the time since somebody wanted each.
    pub fn all(&self) -> Result<Vec<(PathBuf, Duration)>, SnapshotError> {
        let failed = SnapshotError::io(&self.0.directory);
        let entries = std::fs::read_dir(&self.0.directory).map_err(&failed)?;
        let paths = entries.map(|entry| Ok(entry.map_err(&failed)?.path()));
        let paths: Vec<PathBuf> = paths.collect::<Result<_, SnapshotError>>()?;
        let mut wanted = self.0.wanted();
        wanted.retain(|path, _| paths.contains(path));
        let since = |path: PathBuf| {
            let last = *wanted.entry(path.clone()).or_insert_with(Instant::now);
            (path, last.elapsed())
        };
        Ok(paths.into_iter().map(since).collect())
    }

    /// Returns whether this is a directory of this image.
    pub fn is_of(path: &Path, manifest: &Digest) -> bool {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(&prefix(manifest)))
    }

    /// Ends the mount in a directory and removes the directory. Containers that still use the mount keep it.
    pub async fn end(&self, path: &Path) -> Result<(), SnapshotError> {
        let (shelf, at) = (self.0.clone(), path.to_owned());
        let work = async move { Done::Ended(shelf.end(&at).await) };
        match self.task(path, work).await {
            Done::Ended(Err(reason)) => Err(SnapshotError::Image {
                image: path.display().to_string(),
                reason,
            }),
            // Somebody has just asked for it.
            Done::Ended(Ok(())) | Done::Served(_) => Ok(()),
        }
    }

    /// Returns the task that is under way for this directory. If there is none, begins one that does `work`.
    fn task(&self, path: &Path, work: impl Future<Output = Done> + Send + 'static) -> MountTask {
        let mut tasks = self.0.tasks();
        if let Some(task) = tasks.get(path) {
            return task.clone();
        }
        let (shelf, at) = (self.0.clone(), path.to_owned());
        // The work goes on if the one who asked for it goes away.
        let task = tokio::spawn(async move {
            let done = work.await;
            shelf.tasks().remove(&at);
            done
        });
        let (shelf, at) = (self.0.clone(), path.to_owned());
        let task = async move {
            joined(task).await.unwrap_or_else(|error| {
                shelf.tasks().remove(&at);
                Done::Served(Err(error.to_string()))
            })
        };
        let task = task.boxed().shared();
        tasks.insert(path.to_owned(), task.clone());
        task
    }
}

/// Returns how the names of an image's directories begin.
fn prefix(manifest: &Digest) -> String {
    format!("{}-", manifest.to_string().replace(':', "-"))
}

impl Shelf {
    fn tasks(&self) -> MutexGuard<'_, HashMap<PathBuf, MountTask>> {
        self.tasks.lock().expect("no panic while locked")
    }

    fn wanted(&self) -> MutexGuard<'_, HashMap<PathBuf, Instant>> {
        self.wanted.lock().expect("no panic while locked")
    }

    async fn serve(&self, image: &ImageLayers, path: &Path) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        while let Some(record) = self.run.entry(path).record().map_err(|e| text(&e))? {
            if !record.is_alive() {
                break;
            }
            let status = status_of(&self.run, path).await.map_err(|e| text(&e))?;
            match status.state {
                MountState::Ready => return Ok(()),
                // Another process began with it, perhaps for a snapshotter that is gone.
                MountState::Preparing => tokio::time::sleep(LOOK).await,
                MountState::Stalled => return Err(status.problem.unwrap_or_else(|| "no bytes come".to_owned())),
                MountState::Unresponsive => return Err(status.problem.unwrap_or_default()),
                MountState::Failed | MountState::Dead | MountState::Detached => break,
            }
        }
        self.clear(path).await?;
        private::directory(path).map_err(|error| format!("{}: {error}", path.display()))?;
        self.start(image, path).await
    }

    /// Starts a process that serves the image, and waits until the image can be read.
    async fn start(&self, image: &ImageLayers, path: &Path) -> Result<(), String> {
        let mut named: Reference = image.reference.parse().map_err(|error| format!("{error}"))?;
        named.digest = Some(image.manifest.clone());
        let layers = image.layers.to_string();
        let output = Command::from(program(&self.program))
            .arg("mount")
            .args(&self.arguments)
            .args(["--wait", "ready", "--layers", &layers, "--", &named.to_string()])
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .await
            .map_err(|error| format!("cannot run {}: {error}", self.program.display()))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    async fn end(&self, path: &Path) -> Result<(), String> {
        self.clear(path).await?;
        gone(std::fs::remove_dir(path)).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Takes the mount of a directory down, whatever state it is in.
    async fn clear(&self, path: &Path) -> Result<(), String> {
        match take_down(&self.run, path, true).await {
            Ok(_) | Err(TakedownError::NotMounted { .. }) => Ok(()),
            // It is unmounted, and its process serves the containers that still use it.
            Err(TakedownError::Detached { .. }) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}
