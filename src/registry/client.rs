//! The client that a process shares: one set of connection pools, tokens, redirects and measurements for all its
//! images, and for what is published beside them.

use std::sync::Arc;
use std::time::Duration;

use super::auth::Auth;
use super::config::RegistryConfig;
use super::endpoint::{Endpoint, Repository};
use super::failure::{self, Context};
use super::places::{Failures, MIRROR_ATTEMPT, MIRROR_WAIT, PlaceTurn, Places, Sought};
use super::redirects::Redirects;
use super::stats::HostStats;
use super::transport::{Ask, Reply, Transport};
use crate::blob::BlobError;
use crate::blob::retry::{Retry, RetryPolicy};

/// A registry client. Clones share all of its state, and a [hurried](Self::hurried) client shares the connections.
#[derive(Debug, Clone)]
pub struct RegistryClient {
    inner: Arc<ClientState>,
    /// The mirrors that failed, as far as this client knows.
    failures: Arc<Failures>,
    /// Time without progress after which an operation fails.
    timeout: Duration,
}

#[derive(Debug)]
struct ClientState {
    transport: Transport,
    auth: Auth,
    redirects: Redirects,
}

impl RegistryClient {
    /// Builds a client. Reads the configured certificate files, but nothing else, and sends no request.
    pub fn new(config: RegistryConfig) -> Result<Self, BlobError> {
        Ok(Self {
            timeout: config.timeout,
            failures: Arc::default(),
            inner: Arc::new(ClientState {
                transport: Transport::new(config)?,
                auth: Auth::new(),
                redirects: Redirects::new(),
            }),
        })
    }

    /// Returns a client that has the connections and logins of this one, but gives an operation up after `timeout` without
    /// progress, if that is sooner.
    ///
    /// The two judge mirrors separately: one that is too slow for the hurried client may be fast enough for this one.
    #[must_use]
    pub fn hurried(&self, timeout: Duration) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            failures: Arc::default(),
            timeout: timeout.min(self.timeout),
        }
    }

    /// Finds the places of a repository. `by_digest` is whether the image is named by its digest.
    ///
    /// Reads the files about registries. Fails if a name is invalid, or if a file that must be obeyed is malformed.
    pub(super) fn places(&self, registry: &str, repository: &str, by_digest: bool) -> Result<Places, BlobError> {
        let config = self.inner.transport.config();
        let known = Repository::new(Endpoint::new(registry, &config.plain_http)?, repository)?;
        let found = config.hosts.places(&known, by_digest, &config.plain_http)?;
        for place in &found {
            self.inner.transport.meet(&place.repository.endpoint);
        }
        let failures = Arc::clone(&self.failures);
        Ok(Places::new(known.to_string(), found, failures).unwrap_or_else(|| Places::only(Arc::new(known))))
    }

    /// Returns the measurements of all hosts: registries, token servers, and the storage they redirect to.
    pub fn stats(&self) -> Vec<HostStats> {
        self.inner.transport.stats()
    }

    pub(super) fn transport(&self) -> &Transport {
        &self.inner.transport
    }

    pub(super) fn auth(&self) -> &Auth {
        &self.inner.auth
    }

    /// Returns the longest time that one request with a large body may take.
    pub(super) fn patience(&self) -> Duration {
        self.timeout
    }

    pub(super) fn retry(&self) -> Retry {
        Retry::new(RetryPolicy { deadline: self.timeout })
    }

    /// Sends a request, follows redirects, and waits at most `wait` for the head of the response.
    ///
    /// The body is given up if it stalls for half of this client's timeout, which may be shorter than what the transport
    /// knows. So an operation can still resume.
    pub(super) async fn send(&self, ask: &Ask, wait: Duration) -> Result<Reply, BlobError> {
        let longest = self.timeout / 2;
        let ask = Ask {
            stall: Some(ask.stall.map_or(longest, |stall| stall.min(longest))),
            ..ask.clone()
        };
        self.transport().send(&ask, wait).await
    }

    /// Asks the places of a repository for something until one has it or `retry` gives up. `what` names the operation in
    /// errors.
    ///
    /// Each attempt gets the time it may wait for the head of a response. An attempt may consist of several exchanges
    /// (redirect, challenge, token) and a body that arrives just fast enough not to stall. All of them together end
    /// at the deadline, and at a mirror much earlier.
    pub(super) async fn persist<T, F>(
        &self,
        places: &Places,
        wanted: &Sought,
        what: &str,
        retry: &mut Retry,
        mut attempt: impl FnMut(PlaceTurn) -> F,
    ) -> Result<T, BlobError>
    where
        F: Future<Output = Result<T, BlobError>>,
    {
        let mut again = false;
        loop {
            let mirrors: Vec<usize> = places.mirrors_to_ask(wanted, again).collect();
            for place in mirrors {
                let wait = retry.attempt_wait();
                let turn = PlaceTurn {
                    place,
                    wait: if again { wait } else { wait.min(MIRROR_WAIT) },
                    stall: (!again).then_some(MIRROR_WAIT),
                };
                let limit = || match again {
                    true => retry.remaining(),
                    false => MIRROR_ATTEMPT.min(retry.remaining() / 2),
                };
                let mut result = bounded(places.at(place), what, limit(), attempt(turn)).await;
                let meter = self.inner.transport.meter(places.at(place).endpoint.base());
                // A connection that was kept may have died while nobody used it.
                if matches!(result, Err(BlobError::Unreachable { .. })) && meter.reached() {
                    result = bounded(places.at(place), what, limit(), attempt(turn)).await;
                }
                match result {
                    Ok(value) => {
                        places.answered(place, wanted);
                        return Ok(value);
                    }
                    Err(error) => places.failed(place, wanted, &error),
                }
            }
            let turn = PlaceTurn {
                place: places.last(),
                wait: retry.attempt_wait(),
                stall: None,
            };
            match bounded(places.origin(), what, retry.remaining(), attempt(turn)).await {
                Ok(value) => return Ok(value),
                Err(error) => self.pause(places, what, retry, error).await?,
            }
            again = true;
        }
    }

    /// Backs off after a failed attempt, or gives up with an error.
    pub(super) async fn pause(
        &self,
        places: &Places,
        what: &str,
        retry: &mut Retry,
        error: BlobError,
    ) -> Result<(), BlobError> {
        tracing::debug!(what, %error, "interrupted");
        // The retry gives up early on a host that has never responded.
        let mut meters = places
            .all()
            .map(|place| self.inner.transport.meter(place.endpoint.base()));
        let delay = retry.after(error, meters.any(|meter| meter.reached()))?;
        self.inner.transport.meter(places.origin().endpoint.base()).rest(delay);
        tokio::time::sleep(delay).await;
        Ok(())
    }

    /// Returns the URLs that blobs were last redirected to.
    pub(super) fn redirects(&self) -> &Redirects {
        &self.inner.redirects
    }
}

/// Ends an attempt after a time.
async fn bounded<T>(
    place: &Repository,
    what: &str,
    time: Duration,
    attempt: impl Future<Output = Result<T, BlobError>>,
) -> Result<T, BlobError> {
    match tokio::time::timeout(time, attempt).await {
        Ok(result) => result,
        Err(_) => Err(BlobError::Timeout {
            what: format!("{} ({what})", place.endpoint.name()),
            seconds: time.as_secs().max(1),
        }),
    }
}

/// Turns a response with an error status into an error.
pub(super) async fn refusal(mut reply: Reply, what: &str, tried: &str) -> BlobError {
    let body = reply.error_body().await;
    let host = reply.sender();
    let context = Context {
        host: &host,
        what,
        tried,
    };
    failure::status(context, reply.status(), reply.headers(), &body)
}
