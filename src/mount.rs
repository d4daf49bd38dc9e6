//! A mount from beginning to end: attach, prepare, serve, take down.
//!
//! ```text
//!            ┌─────────── unmount, signal ───────────┐
//!            │                                       ▼
//! attach ─▶ Preparing ── tree ready ──▶ Ready ──▶ taken down
//!           │ ▲      │                               ▲
//!           ▼ │      └ cannot be prepared ▶ Failed ──┘
//!         Stalled
//! ```
//! The process mounts the directory as soon as it knows manifest and config. Until the tree is ready, it takes no
//! request from the kernel, so that a signal can kill a waiting program. When the tree is ready, the process
//! answers every request from the image. If the image cannot be prepared, it answers every request with an error.
//!
//! The preparation stalls if no useful bytes come for as long as a read may take. The process then starts to take
//! requests. While the preparation is stalled, requests fail. When the preparation makes progress again, requests
//! wait, and get the image once it is ready.
//!
//! A writable mount appears only when the tree is ready. The process first mounts the image in the run directory
//! and puts an overlay on the mount point. Then it unmounts the image from the run directory, so only the overlay
//! still holds the image. Any unmount of the overlay therefore ends the FUSE session. The process has to watch only
//! for that end.
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
mod error;
mod found;
mod kernel;
mod mountinfo;
mod mountpoint;
mod namespace;
mod options;
mod overlay;
mod prefetch;
mod privilege;
mod process;
mod registration;
mod server;
mod signals;
mod stall;
mod standing;
mod status;
mod survey;
mod takedown;
mod users;

pub use control::{ControlError, Request, Response, call};
pub use error::{MountError, TakedownError};
pub use kernel::KernelMountError;
pub use namespace::SERVE;
pub use options::{FuseOptions, UnknownOption};
pub use overlay::{OverlayError, Upper};
pub use prefetch::{Prefetch, PrefetchState, PrefetchStatus};
pub use privilege::is_system_root;
pub use registration::{MountRecord, RegistrationError, RunDir, RunEntry};
pub use server::{Event, MountConfig, serve};
pub use signals::Signals;
pub use standing::Standing;
pub use status::{LinkStatus, MountState, MountStatus};
pub use survey::{list, status_of};
pub use takedown::{Remainder, take_down};
