//! Credential helper programs: `docker-credential-NAME get`, with the server key on stdin and JSON on stdout.

use std::ffi::OsStr;

use serde::Deserialize;
use tokio::process::Command;

use super::Credential;
use super::config_file::login;
use super::exchange::{ExchangeError, ProgramAnswer, exchange};
use crate::os::program;

/// Why a helper gave no credential.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum HelperError {
    /// The name has characters that could lead outside the search path.
    #[error("not a helper name")]
    Name,
    /// The helper gave no answer.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
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
    run(OsStr::new(&format!("docker-credential-{name}")), key).await
}

/// Runs a helper program. Cancel safe: dropping the future kills the program.
async fn run(helper: &OsStr, key: &str) -> Result<Option<Credential>, HelperError> {
    let mut command = Command::from(program(helper));
    command.arg("get");
    let ProgramAnswer { status, text } = exchange(command, format!("{key}\n").as_bytes()).await?;
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
        assert!(matches!(
            ask("no-such-helper-here", "h").await,
            Err(HelperError::Exchange(ExchangeError::Io(_)))
        ));
    }
}
