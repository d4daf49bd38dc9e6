//! Certificates in a directory of a host, as Docker has them: each `*.crt` is an authority, and each `*.cert` is a
//! certificate of the client, with its key in the `*.key` of the same name.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::registry::host_settings::{ClientFiles, HostTls};

/// Adds the certificates in a directory. A directory that is not there has none.
///
/// A key that this user may not read is left out with a warning: a registry may do without it, and says so if not.
pub(super) fn add(directory: &Path, tls: &mut HostTls) {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return,
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "certificates of a registry are not used");
            return;
        }
    };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    // The order of a directory is that of chance.
    paths.sort();
    for path in paths {
        let kind = path.extension().and_then(|extension| extension.to_str());
        match kind {
            Some("crt") if is_readable(&path) && !tls.authorities.contains(&path) => tls.authorities.push(path),
            Some("cert") => {
                let key = Some(path.with_extension("key")).filter(|key| key.exists());
                let secret = key.as_ref().unwrap_or(&path);
                let files = ClientFiles {
                    certificate: path.clone(),
                    key: key.clone(),
                };
                if is_readable(&path) && is_readable(secret) && !tls.clients.contains(&files) {
                    tls.clients.push(files);
                }
            }
            _ => {}
        }
    }
}

fn is_readable(path: &Path) -> bool {
    match fs::File::open(path) {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "a certificate of a registry is not used");
            false
        }
    }
}
