//! Other programs that this process starts.

use std::ffi::OsStr;
use std::process::Command;

/// Environment variable with the socket on which the service manager listens to its service (sd_notify(3)).
pub const MANAGER: &str = "NOTIFY_SOCKET";

/// Returns the command that starts a program for this process. What the program tells a service manager would count as said
/// by this process, so the program does not learn where that listens.
pub fn program(name: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(name);
    command.env_remove(MANAGER);
    command
}
