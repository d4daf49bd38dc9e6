//! Options of a mount: what serves it, and `-o` (mount(8), fuse(8)).

use std::os::fd::RawFd;

use nix::mount::MsFlags;

use crate::fuse::Access;

/// An option that ocifs does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown mount option `{option}`: known are allow_other, noallow_other, default_permissions, nonempty, ro, suid, nosuid, dev, nodev, exec, noexec, noatime, nodiratime, relatime"
)]
pub struct UnknownOption {
    /// The option as the user wrote it.
    pub option: String,
}

/// What serves a directory tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Via {
    /// The kernel's EROFS if the kernel can do that and the image is ready at once, or awaited. Otherwise FUSE.
    #[default]
    Auto,
    /// FUSE.
    Fuse,
    /// The kernel's EROFS. Needs [`MountConfig::require_ready`](super::MountConfig::require_ready).
    Erofs,
}

/// The options that the kernel gets for a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseOptions {
    /// Lets every user use the mount, as modes and owners allow. Without it, only the user who mounted may use the
    /// mount. Unless `default_permissions` is set, that user may read everything, because the bytes are theirs
    /// anyway.
    pub allow_other: bool,
    /// Applies modes and owners even if only the user who mounted may use the mount.
    pub default_permissions: bool,
    /// Allows a mount point that is not empty.
    pub nonempty: bool,
    /// Applies set-user-id and set-group-id bits.
    pub suid: bool,
    /// Allows opening device nodes.
    pub dev: bool,
    /// Allows running programs.
    pub exec: bool,
    /// Whether the user gave `ro`. All mounts except writable ones are read-only anyway.
    pub read_only: bool,
}

impl FuseOptions {
    /// Returns the options of a mount without `-o`. If `root` is set, the mount is a root file system for every
    /// user. Set-id programs and device nodes work, as in a container. An ordinary user gets a private mount
    /// without them.
    pub fn defaults(root: bool) -> Self {
        Self {
            allow_other: root,
            default_permissions: false,
            nonempty: false,
            suid: root,
            dev: root,
            exec: true,
            read_only: false,
        }
    }

    /// Applies a comma-separated list of options in order. Fails at the first unknown one; those before it stay
    /// applied.
    pub fn apply(&mut self, list: &str) -> Result<(), UnknownOption> {
        for option in list.split(',').map(str::trim).filter(|o| !o.is_empty()) {
            match option {
                "allow_other" => self.allow_other = true,
                "noallow_other" => self.allow_other = false,
                "default_permissions" => self.default_permissions = true,
                "nonempty" => self.nonempty = true,
                "suid" => self.suid = true,
                "nosuid" => self.suid = false,
                "dev" => self.dev = true,
                "nodev" => self.dev = false,
                "exec" => self.exec = true,
                "noexec" => self.exec = false,
                "ro" => self.read_only = true,
                // Every ocifs mount has noatime, so these options change nothing.
                "noatime" | "nodiratime" | "relatime" => {}
                _ => {
                    return Err(UnknownOption {
                        option: option.to_owned(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Returns which users may use the mount.
    pub fn access(&self) -> Access {
        match (self.allow_other, self.default_permissions) {
            (true, _) => Access::Everybody,
            (false, true) => Access::Owner,
            (false, false) => Access::OwnerWithoutCheck,
        }
    }

    /// Returns the flags for mount(2).
    pub(super) fn flags(&self) -> MsFlags {
        // The tree has no access times to update.
        let mut flags = MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
        flags.set(MsFlags::MS_NOSUID, !self.suid);
        flags.set(MsFlags::MS_NODEV, !self.dev);
        flags.set(MsFlags::MS_NOEXEC, !self.exec);
        flags
    }

    /// Returns the data argument for mount(2). `device` is the open /dev/fuse.
    pub(super) fn kernel_data(&self, device: RawFd) -> String {
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        let mut data = format!("fd={device},rootmode=40000,user_id={uid},group_id={gid}");
        self.push_access(&mut data);
        data
    }

    /// Returns the `-o` argument for fusermount3, which mounts the image. `source` is the name of the image.
    pub(super) fn helper_options(&self, source: &str) -> String {
        let source = source.replace('\\', "\\\\").replace(',', "\\,");
        let mut options = format!("ro,subtype=ocifs,fsname={source}");
        self.push_access(&mut options);
        options.push_str(&self.flag_names());
        options
    }

    fn push_access(&self, options: &mut String) {
        if self.allow_other {
            options.push_str(",allow_other");
        }
        if self.allow_other || self.default_permissions {
            options.push_str(",default_permissions");
        }
    }

    /// Returns the names of the restrictions, each after a comma.
    pub(super) fn flag_names(&self) -> String {
        let restrictions = [
            (!self.suid, ",nosuid"),
            (!self.dev, ",nodev"),
            (!self.exec, ",noexec"),
            (true, ",noatime"),
        ];
        restrictions
            .iter()
            .filter(|(on, _)| *on)
            .map(|(_, name)| *name)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_applied_in_order_and_unknown_ones_named() {
        let mut options = FuseOptions::defaults(true);
        options.apply("nosuid, nodev,ro,,default_permissions").unwrap();
        assert!(!options.suid && !options.dev && options.allow_other);
        let flags = options.flags();
        assert!(flags.contains(MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV));
        assert_eq!(options.apply("rw").unwrap_err().option, "rw");
    }

    #[test]
    fn modes_count_wherever_others_have_access() {
        let has = |options: FuseOptions| options.kernel_data(3).contains("default_permissions");
        let (everybody, mut owner) = (FuseOptions::defaults(true), FuseOptions::defaults(false));
        assert!(has(everybody) && !has(owner.clone()));
        owner.apply("default_permissions").unwrap();
        assert!(has(owner));
    }

    #[test]
    fn a_comma_in_the_reference_does_not_become_an_option() {
        let options = FuseOptions::defaults(false).helper_options("host/a,suid:b");
        assert!(
            options.ends_with("fsname=host/a\\,suid:b,nosuid,nodev,noatime"),
            "{options}"
        );
    }
}
