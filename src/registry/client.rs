//! The client shared by a process: one set of pools, tokens, redirects and measurements for all its images.

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

/// A registry client; clones share everything.
#[derive(Debug, Clone)]
pub struct RegistryClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    transport: Transport,
    auth: Auth,
    redirects: Redirects,
}

impl RegistryClient {
    /// Builds a client. Nothing is contacted and, certificate files apart, nothing is read.
    pub fn new(config: RegistryConfig) -> Result<Self, BlobError> {
        Ok(Self {
            inner: Arc::new(Inner {
                transport: Transport::new(config)?,
                auth: Auth::new(),
                redirects: Redirects::new(),
            }),
        })
    }

    /// A repository as this client would address it.
    pub(super) fn repository(&self, registry: &str, repository: &str) -> Result<Repository, BlobError> {
        let endpoint = Endpoint::new(registry, &self.inner.transport.config().plain_http)?;
        self.inner.transport.meet(&endpoint);
        Repository::new(endpoint, repository)
    }

    /// What was learned about the hosts spoken to: registries, token servers and storage they redirect to.
    pub fn stats(&self) -> Vec<HostStats> {
        self.inner.transport.stats()
    }

    pub(super) fn transport(&self) -> &Transport {
        &self.inner.transport
    }

    pub(super) fn auth(&self) -> &Auth {
        &self.inner.auth
    }

    pub(super) fn retry(&self) -> Retry {
        Retry::new(RetryPolicy {
            deadline: self.inner.transport.config().timeout,
        })
    }

    /// Makes attempts at something (`what`) of a repository until one succeeds or `retry` gives up. Each is told how long it may
    /// wait for the head of an answer. It may consist of several exchanges (redirect, challenge, token) and a body that drips
    /// just fast enough to pass as alive; together they end at the deadline.
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

    /// Sleeps until the attempt after one that failed, or gives up.
    pub(super) async fn pause(
        &self,
        repository: &Repository,
        what: &str,
        retry: &mut Retry,
        error: BlobError,
    ) -> Result<(), BlobError> {
        tracing::debug!(what, %error, "interrupted");
        // A host that has never answered is not worth waiting for.
        let meter = self.inner.transport.meter(repository.endpoint.base());
        let delay = retry.after(error, meter.reached())?;
        meter.rest(delay);
        tokio::time::sleep(delay).await;
        Ok(())
    }

    /// Where blobs were last redirected to.
    pub(super) fn redirects(&self) -> &Redirects {
        &self.inner.redirects
    }
}

/// An answer with an unwelcome status, as an error.
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
