//! Credential helper programs: `docker-credential-NAME get`, with the server key on stdin and JSON on stdout.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::Credential;
use super::config_file::login;
use crate::os::program;

/// Timeout of a helper. Cloud helpers ask a metadata service or refresh a session, which takes seconds, not minutes.
/// The timeout is shorter than that of a lookup by default, so that the error names the helper.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most bytes read of a helper's output.
const MAX_ANSWER: u64 = 1 << 20;

/// Why a helper gave no credential.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum HelperError {
    /// The name has characters that could lead outside the search path.
    #[error("not a helper name")]
    Name,
    /// The helper could not be started, or a pipe to it failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The helper did not end in time.
    #[error("no answer within {}s", PATIENCE.as_secs())]
    Timeout,
    /// The helper reported an error.
    #[error("{message}")]
    Refused {
        /// Exit status and first line of the output.
        message: String,
    },
    /// The output is not the JSON of the protocol. The error does not show the output, which may hold the secret.
    #[error("the answer is not the JSON of the helper protocol")]
    HelperAnswer,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Asks a helper for the credential of `key`. Returns `None` if the helper has none.
pub(super) async fn ask(name: &str, key: &str) -> Result<Option<Credential>, HelperError> {
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err(HelperError::Name);
    }
    match tokio::time::timeout(PATIENCE, run(OsStr::new(&format!("docker-credential-{name}")), key)).await {
        Ok(answer) => answer,
        Err(_) => Err(HelperError::Timeout),
    }
}

/// Runs a helper program. Cancel safe: dropping the future kills the program.
async fn run(helper: &OsStr, key: &str) -> Result<Option<Credential>, HelperError> {
    let mut child = Command::from(program(helper))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        let written = stdin.write_all(format!("{key}\n").as_bytes()).await;
        // A helper that needs no input may have ended already. Its output still counts.
        if let Err(error) = written
            && error.kind() != std::io::ErrorKind::BrokenPipe
        {
            return Err(error.into());
        }
    }
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_ANSWER).read_to_end(&mut text).await?;
    }
    let status = child.wait().await?;
    if !status.success() {
        let message = String::from_utf8_lossy(&text);
        if message.contains("credentials not found") {
            return Ok(None);
        }
        let line = message.lines().next().unwrap_or_default();
        return Err(HelperError::Refused {
            message: format!("{status}: {}", line.chars().take(200).collect::<String>()),
        });
    }
    let answer: HelperAnswer = serde_json::from_slice(&text).map_err(|_| HelperError::HelperAnswer)?;
    if answer.username.is_empty() && answer.secret.is_empty() {
        return Ok(None);
    }
    Ok(Some(login(&answer.username, &answer.secret)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a shell script as a helper and returns its result for `key`.
    async fn script(body: &str, key: &str) -> Result<Option<Credential>, HelperError> {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("docker-credential-test");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        run(path.as_os_str(), key).await
    }

    #[tokio::test]
    async fn helpers_speak_the_protocol() {
        let echo = r#"test "$1" = get && read key && printf '{"ServerURL":"%s","Username":"u-%s","Secret":"s"}' "$key" "$key""#;
        let found = script(echo, "r.lan").await.unwrap().unwrap();
        assert!(matches!(found, Credential::Basic { username, .. } if username == "u-r.lan"));
        let token = r#"echo '{"Username":"<token>","Secret":"t"}'"#;
        assert!(matches!(
            script(token, "h").await,
            Ok(Some(Credential::IdentityToken(_)))
        ));
        let none = "echo credentials not found in native keychain; exit 1";
        assert!(matches!(script(none, "h").await, Ok(None)));
        let refused = script("echo session expired; exit 3", "h").await.unwrap_err();
        assert!(refused.to_string().contains("session expired"), "{refused}");
        assert!(matches!(
            script("echo hello", "h").await,
            Err(HelperError::HelperAnswer)
        ));
    }

    #[tokio::test]
    async fn names_stay_on_the_search_path() {
        assert!(matches!(ask("../../tmp/x", "h").await, Err(HelperError::Name)));
        assert!(matches!(ask("no-such-helper-here", "h").await, Err(HelperError::Io(_))));
    }
}
