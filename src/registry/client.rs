//! The client that a process shares: one set of connection pools, tokens, redirects and measurements for all its
//! images.

use std::sync::Arc;
use std::time::Duration;

use super::auth::Auth;
use super::config::RegistryConfig;
use super::endpoint::{Endpoint, Repository};
use super::failure::{self, Context};
use super::redirects::Redirects;
use super::stats::HostStats;
use super::transport::{Reply, Transport, authority};
use crate::blob::BlobError;
use crate::blob::retry::{Retry, RetryPolicy};

/// A registry client. Clones share all of its state.
#[derive(Debug, Clone)]
pub struct RegistryClient {
    inner: Arc<ClientState>,
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
            inner: Arc::new(ClientState {
                transport: Transport::new(config)?,
                auth: Auth::new(),
                redirects: Redirects::new(),
            }),
        })
    }

    /// Makes a repository as this client addresses it. Fails if a name is invalid.
    pub(super) fn repository(&self, registry: &str, repository: &str) -> Result<Repository, BlobError> {
        let endpoint = Endpoint::new(registry, &self.inner.transport.config().plain_http)?;
        self.inner.transport.meet(&endpoint);
        Repository::new(endpoint, repository)
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
        self.inner.transport.config().timeout
    }

    pub(super) fn retry(&self) -> Retry {
        Retry::new(RetryPolicy {
            deadline: self.inner.transport.config().timeout,
        })
    }

    /// Makes attempts at an operation on a repository until one succeeds or `retry` gives up. `what` names the
    /// operation in errors.
    ///
    /// Each attempt gets the time it may wait for the head of a response. An attempt may consist of several exchanges
    /// (redirect, challenge, token) and a body that arrives just fast enough not to stall. All of them together end
    /// at the deadline.
    pub(super) async fn persist<T, F>(
        &self,
        repository: &Repository,
        what: &str,
        retry: &mut Retry,
        mut attempt: impl FnMut(Duration) -> F,
    ) -> Result<T, BlobError>
    where
        F: Future<Output = Result<T, BlobError>>,
    {
        loop {
            let result = match tokio::time::timeout(retry.remaining(), attempt(retry.attempt_wait())).await {
                Ok(result) => result,
                Err(_) => Err(BlobError::Timeout {
                    what: format!("{} ({what})", repository.endpoint.name()),
                    seconds: self.inner.transport.config().timeout.as_secs().max(1),
                }),
            };
            match result {
                Ok(value) => return Ok(value),
                Err(error) => self.pause(repository, what, retry, error).await?,
            }
        }
    }

    /// Backs off after a failed attempt, or gives up with an error.
    pub(super) async fn pause(
        &self,
        repository: &Repository,
        what: &str,
        retry: &mut Retry,
        error: BlobError,
    ) -> Result<(), BlobError> {
        tracing::debug!(what, %error, "interrupted");
        // The retry gives up early on a host that has never responded.
        let meter = self.inner.transport.meter(repository.endpoint.base());
        let delay = retry.after(error, meter.reached())?;
        meter.rest(delay);
        tokio::time::sleep(delay).await;
        Ok(())
    }

    /// Returns the URLs that blobs were last redirected to.
    pub(super) fn redirects(&self) -> &Redirects {
        &self.inner.redirects
    }
}

/// Turns a response with an error status into an error.
pub(super) async fn refusal(mut reply: Reply, what: &str, tried: &str) -> BlobError {
    let body = reply.error_body().await;
    let host = authority(&reply.url);
    let context = Context {
        host: &host,
        what,
        tried,
    };
    failure::status(context, reply.status(), reply.headers(), &body)
}
