//! One exchange with a program that knows logins: a request on its standard input, an answer on its standard output.

use std::io;
use std::process::ExitStatus;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// Timeout of a program. Those for clouds ask a metadata service or refresh a session, which takes seconds, not minutes.
/// The timeout is shorter than that of a lookup by default, so that the error names the program.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most bytes read of an answer.
const MAX_ANSWER: u64 = 1 << 20;

/// Why a program gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum ExchangeError {
    /// The program could not be started, or a pipe to it failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The program did not end in time.
    #[error("no answer within {}s", PATIENCE.as_secs())]
    Timeout,
}

/// What a program answered.
#[derive(Debug)]
pub(super) struct ProgramAnswer {
    pub(super) status: ExitStatus,
    /// What it wrote, which may hold a secret.
    pub(super) text: Vec<u8>,
}

/// Runs a program with this request. Cancel safe: dropping the future kills the program.
pub(super) async fn exchange(command: Command, request: &[u8]) -> Result<ProgramAnswer, ExchangeError> {
    match tokio::time::timeout(PATIENCE, run(command, request)).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(ExchangeError::Timeout),
    }
}

async fn run(mut command: Command, request: &[u8]) -> io::Result<ProgramAnswer> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        let written = stdin.write_all(request).await;
        // A program that needs no input may have ended already. Its output still counts.
        if let Err(error) = written
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(error);
        }
    }
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_ANSWER).read_to_end(&mut text).await?;
    }
    let status = child.wait().await?;
    Ok(ProgramAnswer { status, text })
}
