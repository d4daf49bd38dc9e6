//! Waiting for the tasks and threads of this program.
//!
//! A task that panics ends without a result. The caller that waits for it gets the text of the panic as an error, and
//! the user sees what went wrong.

use std::any::Any;

use tokio::task::{JoinError, JoinHandle};

/// Why a task ended without a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TaskError {
    /// The program is shutting down.
    #[error("ocifs is shutting down")]
    Ended,
    /// The task panicked.
    #[error("a defect in ocifs, please report it: {text}")]
    Panicked {
        /// The text of the panic.
        text: String,
    },
}

impl From<JoinError> for TaskError {
    fn from(error: JoinError) -> Self {
        match error.try_into_panic() {
            Ok(payload) => Self::panicked(&*payload),
            Err(_) => Self::Ended,
        }
    }
}

impl TaskError {
    /// Makes the error of a panic with this payload (see [`std::panic::catch_unwind`]).
    pub(crate) fn panicked(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        Self::Panicked {
            text: text.unwrap_or("a panic without a text").to_owned(),
        }
    }
}

/// Waits for a task and returns its result.
pub async fn joined<T>(task: JoinHandle<T>) -> Result<T, TaskError> {
    Ok(task.await?)
}

/// Runs `work` on a thread that may block, and returns its result.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, TaskError> {
    joined(tokio::task::spawn_blocking(work)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_text_of_a_panic_reaches_the_caller() {
        for (work, text) in [
            ((|| panic!("nothing is left")) as fn(), "nothing is left"),
            (|| panic!("{} are left", 3), "3 are left"),
            (|| std::panic::panic_any(3), "a panic without a text"),
        ] {
            let error = blocking(work).await.unwrap_err();
            assert_eq!(error, TaskError::Panicked { text: text.to_owned() });
        }
        assert_eq!(blocking(|| 3).await, Ok(3));
        let ended = tokio::spawn(std::future::pending::<()>());
        ended.abort();
        assert_eq!(joined(ended).await, Err(TaskError::Ended));
    }
}
