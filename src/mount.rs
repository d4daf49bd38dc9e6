//! A mount or a disk from beginning to end: attach, prepare, serve, take down.
//!
//! ```text
//!            ┌─────────── unmount, signal ───────────┐
//!            │                                       ▼
//! attach ─▶ Preparing ── tree ready ──▶ Ready ──▶ taken down
//!           │ ▲      │                               ▲
//!           ▼ │      └ cannot be prepared ▶ Failed ──┘
//!         Stalled
//! ```
//! The process mounts the directory by FUSE as soon as it knows manifest and config. Until the tree is ready, it takes no
//! request from the kernel, so that a signal can kill a waiting program. When the tree is ready, the process
//! answers every request from the image. If the image cannot be prepared, it answers every request with an error.
//!
//! The preparation stalls if no useful bytes come for as long as a read may take. The process then starts to take
//! requests. While the preparation is stalled, requests fail. When the preparation makes progress again, requests
//! wait, and get the image once it is ready.
//!
//! Some attachments appear only when the tree is ready. Until then, the registration holds their place.
//! - A writable mount. The process first mounts the image in the run directory and puts an overlay on the mount point.
//!   Then it unmounts the image from the run directory, so only the overlay still holds the image.
//! - A mount that the kernel's EROFS serves. The process first mounts the image's disk by FUSE in the run directory, and
//!   the kernel mounts EROFS from that file. Then the process unmounts the disk, so only EROFS still holds it. If the image
//!   is not ready within a second, although the store has it, FUSE serves the mount instead.
//! - A disk. Its size is known when the tree is there. It has up to three doors: a directory with the disk as a file, and
//!   sockets that speak NBD and vhost-user-blk.
//!
//! Any unmount of the overlay or of EROFS ends the FUSE session below it. So the process has to watch only for that end.
//! A disk ends when `umount` has closed its doors and the last client is gone.
//!
//! Other mount namespaces may have copies of a mount, and programs may have its files open. After an unmount the
//! process goes on serving these users. It stays registered until the last of them is gone. `list` names them.
//!
//! Invariants:
//! - A process that ends detaches its mounts, and removes its registration and its private upper directory. The
//!   cause of its end does not matter: an unmount by any program, a signal, or the end of its mount namespace.
//! - A process that is killed leaves a registration, and `umount` recognises it as dead.
//! - No other command depends on an answer of the process.

mod attached;
mod attachment;
mod control;
mod doors;
mod error;
mod found;
mod kernel;
mod kernel_call;
mod metrics;
mod mountinfo;
mod mountpoint;
mod namespace;
mod options;
mod overlay;
mod path_bytes;
mod prefetch;
mod privilege;
mod process;
mod registration;
mod server;
mod signals;
mod socket_file;
mod socket_table;
mod stall;
mod standing;
mod status;
mod summary;
mod survey;
mod takedown;
mod users;

pub use crate::fuse::DISK_FILE;
pub use control::{ControlError, Request, Response, call};
pub use doors::{DiskDoors, DoorAddress, DoorAddressError};
pub use error::{MountError, TakedownError};
pub use kernel::KernelMountError;
pub use metrics::{MetricsPlace, UnknownMetricsPlace};
pub use namespace::SERVE;
pub use options::{FuseOptions, UnknownOption, Via};
pub use overlay::{OverlayError, Upper};
pub use prefetch::{Prefetch, PrefetchState, PrefetchStatus};
pub use privilege::is_system_root;
pub use registration::{AttachPhase, Carrier, MountRecord, RegistrationError, RunDir, RunEntry};
pub use server::{DirectoryConfig, Event, MountConfig, Shape, serve};
pub use signals::{Signals, is_ignored};
pub use socket_file::SocketFile;
pub use standing::Standing;
pub use status::{LinkStatus, MountState, MountStatus};
pub use summary::RunSummary;
pub use survey::{list, status_of};
pub use takedown::{TakenDown, take_down};
