//! Waiting for an event that no process announces, by polling for some time.

use std::time::{Duration, Instant};

/// Calls `look` every `pause` until it returns something. Returns none when `patience` is over. Calls `look` at least
/// once.
pub async fn until<T, E>(
    pause: Duration,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    let deadline = Instant::now() + patience;
    loop {
        match look()? {
            None if Instant::now() < deadline => tokio::time::sleep(pause).await,
            found => return Ok(found),
        }
    }
}

/// Polls like [`until`], on a thread that may block.
pub(crate) fn until_blocking<T, E>(
    pause: Duration,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    let deadline = Instant::now() + patience;
    loop {
        match look()? {
            None if Instant::now() < deadline => std::thread::sleep(pause),
            found => return Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[tokio::test]
    async fn one_looks_until_there_is_something_or_time_is_up() {
        let (pause, patience) = (Duration::from_millis(1), Duration::from_secs(60));
        let mut looks = 0;
        let mut third = || {
            looks += 1;
            Ok::<_, Infallible>((looks == 3).then_some(looks))
        };
        assert_eq!(until(pause, patience, &mut third).await, Ok(Some(3)));
        assert_eq!(until_blocking(pause, Duration::ZERO, &mut third), Ok(None));
        assert_eq!(looks, 4);
        assert_eq!(until(pause, patience, || Err::<Option<()>, _>("no")).await, Err("no"));
    }
}
