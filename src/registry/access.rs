//! Requests with what their host wants to be shown: challenges answered, refused credentials renewed.
//!
//! ```text
//!   send ─▶ 401 ─▶ token or password of the challenge's realm ─▶ send again
//!       ─▶ 400, 403 to a request with a login ─▶ the login as it is now, if it is another ─▶ send again
//!       ─▶ 401 of a host that a redirect led to ─▶ the same, as if that host had been asked in the first place
//! ```
//! Registries with logins that end answer in all these ways when one has ended. Each is believed once: what is refused with a
//! login that was just obtained is refused for good. Hosts never see each other's logins.

use std::time::{Duration, Instant};

use reqwest::{StatusCode, Url};

use super::auth::{self, Scheme, Ticket};
use super::client::RegistryClient;
use super::endpoint::{Endpoint, Repository};
use super::failure;
use super::transport::{Ask, Reply};
use crate::blob::BlobError;

/// 401 answers to one request that are worth another try: no token, a token that was refused, one raced by another reader.
const CHALLENGES: usize = 3;
/// Hosts that one request may be redirected to and that want a login.
const GUARDED_HOSTS: usize = 2;

/// An authorised answer, and the credentials story for error texts.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) reply: Reply,
    pub(super) tried: String,
}

impl RegistryClient {
    /// Sends a request below a repository to its registry.
    ///
    /// Any status is returned to the caller, but for a 401 of the registry that no login helps against.
    pub(super) async fn request(
        &self,
        repository: &Repository,
        ask: &Ask,
        wait: Duration,
    ) -> Result<Answer, BlobError> {
        let mut answer = self.authorised(repository, ask, true, wait).await?;
        for _ in 0..GUARDED_HOSTS {
            let reply = &answer.reply;
            if !reply.crossed || reply.status() != StatusCode::UNAUTHORIZED {
                break;
            }
            let (url, hops) = (reply.url.clone(), reply.hops);
            let there = self.elsewhere(repository, &url);
            let Some(scheme) = auth::choose(reply.headers(), &url, &there) else {
                break;
            };
            self.auth().challenged(&there, scheme, None);
            let ask = Ask {
                url,
                guarded: self.transport().leads_to_public_only(repository.endpoint.base()),
                ..ask.clone()
            };
            answer = self.authorised(&there, &ask, false, wait).await?;
            answer.reply.crossed = true;
            answer.reply.hops += hops;
        }
        Ok(answer)
    }

    /// Sends a request to a place that the registry once redirected to.
    pub(super) async fn request_elsewhere(
        &self,
        repository: &Repository,
        ask: &Ask,
        wait: Duration,
    ) -> Result<Answer, BlobError> {
        let there = self.elsewhere(repository, &ask.url);
        self.authorised(&there, ask, false, wait).await
    }

    /// A repository as the host of `url` has it.
    fn elsewhere(&self, repository: &Repository, url: &Url) -> Repository {
        Repository {
            endpoint: Endpoint::at(url, &self.transport().config().plain_http),
            name: repository.name.clone(),
        }
    }

    async fn authorised(
        &self,
        repository: &Repository,
        ask: &Ask,
        is_registry: bool,
        wait: Duration,
    ) -> Result<Answer, BlobError> {
        let started = Instant::now();
        let transport = self.transport();
        let mut ask = ask.clone();
        let mut fresh_refused = 0;
        let mut ticket: Option<Ticket> = self.auth().ticket(transport, repository, wait).await?;
        for _ in 0..=CHALLENGES {
            ask.authorization = ticket.as_ref().map(|ticket| ticket.header.clone());
            let mut reply = transport.send(&ask, wait).await?;
            let tried = || ticket.as_ref().map(|ticket| ticket.tried.clone()).unwrap_or_default();
            let status = reply.status().as_u16();
            if !matches!(status, 400 | 401 | 403) || reply.crossed {
                return Ok(Answer { tried: tried(), reply });
            }
            let fresh = ticket.as_ref().filter(|ticket| ticket.obtained >= started);
            if status != 401 {
                // Refused for good, unless the login has ended meanwhile and there is another one.
                let renewed = match (&ticket, fresh) {
                    (Some(old), None) => self.renew(repository, old, &reply, wait).await?,
                    _ => None,
                };
                let Some(renewed) = renewed else {
                    return Ok(Answer { tried: tried(), reply });
                };
                ticket = Some(renewed);
                continue;
            }
            let scheme = match auth::choose(reply.headers(), &reply.url, repository) {
                None if is_registry => self.scheme_of_base(repository, wait).await?,
                scheme => scheme,
            };
            if scheme.is_none() && !is_registry {
                return Ok(Answer { tried: tried(), reply });
            }
            let said = failure::message(&reply.error_body().await);
            if let Some(ticket) = fresh {
                fresh_refused += 1;
                if fresh_refused > ticket.second_chances {
                    return Err(auth::unauthorized(repository, &tried(), &said));
                }
            }
            let Some(scheme) = scheme else {
                return Err(auth::unauthorized(repository, &tried(), &said));
            };
            drop(reply);
            self.auth().challenged(repository, scheme, ticket.as_ref());
            ticket = self.auth().ticket(transport, repository, wait).await?;
        }
        Err(auth::unauthorized(repository, "credentials refused repeatedly", ""))
    }

    /// Asks for the login again after `old` was refused without a challenge: the new ticket, if there is another login.
    async fn renew(
        &self,
        repository: &Repository,
        old: &Ticket,
        reply: &Reply,
        wait: Duration,
    ) -> Result<Option<Ticket>, BlobError> {
        match auth::choose(reply.headers(), &reply.url, repository) {
            Some(scheme) => self.auth().challenged(repository, scheme, Some(old)),
            None => self.auth().refused(repository, old),
        }
        let renewed = self.auth().ticket(self.transport(), repository, wait).await;
        match renewed {
            Ok(renewed) => Ok(renewed.filter(|renewed| renewed.header != old.header)),
            // What the registry said tells more than that there is no login any more.
            Err(BlobError::Unauthorized { tried, .. }) => {
                tracing::debug!(%repository, tried, "there is no other login");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The scheme that a registry states only at the base of its API.
    async fn scheme_of_base(&self, repository: &Repository, wait: Duration) -> Result<Option<Scheme>, BlobError> {
        let base = repository.endpoint.base();
        let ping = self.transport().send(&Ask::get(base.clone()), wait).await?;
        let refused = ping.status() == StatusCode::UNAUTHORIZED && !ping.crossed;
        Ok(refused
            .then(|| auth::choose(ping.headers(), base, repository))
            .flatten())
    }
}
