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
//! The directory is mounted as soon as manifest and config are known. Until the tree is ready no request is taken from the
//! kernel, so that waiting processes can be killed; afterwards every request is answered: from the image, or with an error if
//! it could not be prepared. If nothing useful comes for as long as a read may take, requests are taken all the same: they
//! fail until the image comes on, wait while it does, and get the image when it is there.
//!
//! A writable mount appears only when the tree is ready: the image is mounted in the run directory, an overlay is put on the
//! mount point, and the image's own mount goes away again. The overlay holds the image by itself, nobody else can reach it, and
//! whoever unmounts the overlay, in whatever way, thereby ends the session. So the end of the session is all there is to watch.
//!
//! Other mount namespaces may have copies of a mount, and files in it may be open: after an unmount the process serves those,
//! and stays registered until the last one is gone. `list` says who that is.
//!
//! Invariants: whatever way the process ends (unmount, signal, somebody else's umount, the end of its mount namespace) it
//! detaches what it mounted, removes its registration and its private upper directory; one that is killed leaves a
//! registration that `umount` recognises as dead. No other command depends on the process being able to answer.

mod attached;
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
pub use registration::{MountRecord, RegistrationError, RunDir, RunEntry, Standing};
pub use server::{Event, MountConfig, serve};
pub use signals::Signals;
pub use status::{LinkStatus, MountState, MountStatus};
pub use survey::{list, status_of};
pub use takedown::{Remainder, take_down};
