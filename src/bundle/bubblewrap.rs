//! The same container by bubblewrap (bwrap(1)): a sandbox that needs neither root nor an OCI runtime.
//!
//! Bubblewrap knows one user and one group inside. They are those of the program, and stand for the user and the group who
//! start bubblewrap.

use std::ffi::OsString;
use std::path::Path;

use super::container::CAPABILITIES;
use super::{Account, BundleError, ContainerConfig, Network};
use crate::oci::ImageConfig;

impl ContainerConfig {
    /// Returns the arguments with which bubblewrap runs the container, on the root in the directory `rootfs`. `passwd` and
    /// `group` are the image's files, or empty.
    pub fn bubblewrap(
        &self,
        image: &ImageConfig,
        passwd: &[u8],
        group: &[u8],
        rootfs: &Path,
    ) -> Result<Vec<OsString>, BundleError> {
        let user = self.user.as_deref().unwrap_or(&image.config.user);
        let account = Account::find(user, passwd, group)?;
        let mut words = Words::default();
        match self.rootless {
            Some(_) => {
                let (uid, gid) = (account.uid.to_string(), account.gid.to_string());
                words.add(["--unshare-user", "--uid", &uid, "--gid", &gid]);
            }
            None if (account.uid, account.gid) == (0, 0) => {}
            None => {
                return Err(BundleError::OtherUser {
                    what: "bubblewrap with root",
                    uid: account.uid,
                    gid: account.gid,
                    instead: "use crun or runc",
                });
            }
        }
        // The program is the first process of its namespace, as in other containers. It ends with the caller.
        words.add([
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-uts",
            "--unshare-cgroup-try",
        ]);
        words.add(["--as-pid-1", "--die-with-parent"]);
        if self.network == Network::None {
            words.add(["--unshare-net"]);
        }
        if !self.terminal {
            // Otherwise the program could put words into the terminal of the caller.
            words.add(["--new-session"]);
        }
        words.add(["--hostname", &self.hostname]);
        words.add([if self.read_only { "--ro-bind" } else { "--bind" }]);
        words.add([rootfs.as_os_str(), "/".as_ref()]);
        words.add(["--proc", "/proc", "--dev", "/dev", "--mqueue", "/dev/mqueue"]);
        words.add(["--ro-bind", "/sys", "/sys"]);
        for volume in &self.volumes {
            words.add(["--tmpfs".as_ref(), Path::new("/").join(volume).as_os_str()]);
        }
        for shared in &self.shared {
            words.add(["--ro-bind".as_ref(), shared.as_os_str(), shared.as_os_str()]);
        }
        words.add(["--chdir".as_ref(), self.workdir(image).as_os_str()]);
        words.add(["--clearenv"]);
        for variable in self.env(image, &account) {
            // A variable without a value says nothing.
            if let Some((name, value)) = variable.split_once('=').filter(|(name, _)| !name.is_empty()) {
                words.add(["--setenv", name, value]);
            }
        }
        words.add(["--cap-drop", "ALL"]);
        if account.uid == 0 {
            for capability in CAPABILITIES {
                words.add(["--cap-add", &format!("CAP_{capability}")]);
            }
        }
        words.add(["--"]);
        words.add(self.program(image)?);
        Ok(words.0)
    }
}

/// A command line that grows.
#[derive(Default)]
struct Words(Vec<OsString>);

impl Words {
    fn add<T: Into<OsString>>(&mut self, words: impl IntoIterator<Item = T>) {
        self.0.extend(words.into_iter().map(Into::into));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0::/root:/bin/sh\nnode:x:1000:1001::/home/node:/bin/sh\n";

    fn line(container: &ContainerConfig, config: &str) -> Result<String, BundleError> {
        let image = ImageConfig::parse(format!(r#"{{"config":{config}}}"#).as_bytes()).unwrap();
        let words = container.bubblewrap(&image, PASSWD, b"", "/root fs".as_ref())?;
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        Ok(words.join("|"))
    }

    #[test]
    fn the_container_is_that_of_the_configuration() {
        let container = ContainerConfig {
            hostname: "web".to_owned(),
            rootless: Some((1000, 1000)),
            network: Network::None,
            volumes: vec!["/data".to_owned()],
            shared: vec!["/etc/hosts".into()],
            ..ContainerConfig::default()
        };
        let config = r#"{"User":"node","Cmd":["node","--","x"],"WorkingDir":"app","Env":["A=b=c","=odd","NONE"]}"#;
        let words = line(&container, config).unwrap();
        for part in [
            "--unshare-user|--uid|1000|--gid|1001|",
            "|--unshare-net|",
            "|--new-session|",
            "|--hostname|web|",
            "|--bind|/root fs|/|",
            "|--tmpfs|/data|",
            "|--ro-bind|/etc/hosts|/etc/hosts|",
            "|--chdir|/app|--clearenv|",
            "|--setenv|HOME|/home/node|",
            "|--setenv|A|b=c|--cap-drop|ALL|--|node|--|x",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }

    #[test]
    fn root_has_the_capabilities_of_other_engines_and_is_nobody_else() {
        let container = ContainerConfig {
            read_only: true,
            terminal: true,
            ..ContainerConfig::default()
        };
        let words = line(&container, r#"{"Cmd":["sh"]}"#).unwrap();
        assert!(words.contains("|--ro-bind|/root fs|/|") && words.contains("|--cap-add|CAP_NET_BIND_SERVICE|"));
        assert!(!words.contains("--unshare-net") && !words.contains("--new-session") && !words.contains("--uid"));
        let error = line(&container, r#"{"User":"node","Cmd":["sh"]}"#).unwrap_err();
        assert!(matches!(
            error,
            BundleError::OtherUser {
                uid: 1000,
                gid: 1001,
                ..
            }
        ));
    }
}
