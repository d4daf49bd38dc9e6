//! Authorised requests: answers challenges and renews refused credentials.
//!
//! ```text
//!   send ─▶ 401 ─▶ token or password for the realm of the challenge ─▶ send again
//!       ─▶ 400, 403 to a request with a login ─▶ look the login up; if it is another one ─▶ send again
//!       ─▶ 401 of a host that a redirect led to ─▶ answer its challenge, as if the request had gone there first
//! ```
//! Registries with logins that expire respond in all these ways when a login has expired. If the refused login was
//! just obtained, the refusal is final. Only a new token gets one more attempt, see [`GrantTicket::second_chances`]. A
//! host never gets the login of another host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{StatusCode, Url};

use super::auth::{self, GrantTicket, Scheme};
use super::client::RegistryClient;
use super::endpoint::{Endpoint, Repository};
use super::failure;
use super::transport::{Ask, Reply};
use crate::blob::BlobError;

/// Most 401 responses to one request that lead to another attempt: to a request without a token, to a refused token,
/// and to a token that another reader's request made invalid.
const CHALLENGES: usize = 3;
/// Most hosts with a login of their own that one request may be redirected to.
const GUARDED_HOSTS: usize = 2;

/// An authorised response, and the credentials that were tried, for error texts.
#[derive(Debug)]
pub(super) struct AuthorisedReply {
    pub(super) reply: Reply,
    pub(super) tried: String,
}

impl RegistryClient {
    /// Sends a request below a repository to its registry.
    ///
    /// Returns a response with any status. A 401 of the registry that no login resolves is an error.
    pub(super) async fn request(
        &self,
        repository: &Repository,
        ask: &Ask,
        wait: Duration,
    ) -> Result<AuthorisedReply, BlobError> {
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

    /// Sends a request to a place outside the registry: one that it once redirected to, or one that the image names.
    pub(super) async fn request_elsewhere(
        &self,
        repository: &Repository,
        ask: &Ask,
        wait: Duration,
    ) -> Result<AuthorisedReply, BlobError> {
        let there = self.elsewhere(repository, &ask.url);
        self.authorised(&there, ask, false, wait).await
    }

    /// Returns the repository with the host of `url` in the place of its registry.
    fn elsewhere(&self, repository: &Repository, url: &Url) -> Repository {
        let settings = repository.endpoint.settings().for_storage();
        Repository {
            endpoint: Endpoint::at(url, &self.transport().config().plain_http, settings),
            name: repository.name.clone(),
        }
    }

    async fn authorised(
        &self,
        repository: &Repository,
        ask: &Ask,
        is_registry: bool,
        wait: Duration,
    ) -> Result<AuthorisedReply, BlobError> {
        let started = Instant::now();
        let transport = self.transport();
        let mut ask = Ask {
            settings: Arc::clone(repository.endpoint.settings()),
            ..ask.clone()
        };
        let mut fresh_refused = 0;
        let mut ticket: Option<GrantTicket> = self.auth().ticket(transport, repository, wait).await?;
        for _ in 0..=CHALLENGES {
            ask.authorization = ticket.as_ref().map(|ticket| ticket.header.clone());
            let mut reply = self.send(&ask, wait).await?;
            let tried = || ticket.as_ref().map(|ticket| ticket.tried.clone()).unwrap_or_default();
            let status = reply.status().as_u16();
            if !matches!(status, 400 | 401 | 403) || reply.crossed {
                return Ok(AuthorisedReply { tried: tried(), reply });
            }
            let fresh = ticket.as_ref().filter(|ticket| ticket.obtained >= started);
            if status != 401 {
                // The refusal is final, unless the login has expired meanwhile and there is another one.
                let renewed = match (&ticket, fresh) {
                    (Some(old), None) => self.renew(repository, old, &reply, wait).await?,
                    _ => None,
                };
                let Some(renewed) = renewed else {
                    return Ok(AuthorisedReply { tried: tried(), reply });
                };
                ticket = Some(renewed);
                continue;
            }
            let scheme = match auth::choose(reply.headers(), &reply.url, repository) {
                None if is_registry => self.scheme_of_base(repository, wait).await?,
                scheme => scheme,
            };
            if scheme.is_none() && !is_registry {
                return Ok(AuthorisedReply { tried: tried(), reply });
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

    /// Looks the login up again after the registry refused `old` with 400 or 403. Returns the new ticket if there is
    /// another login.
    async fn renew(
        &self,
        repository: &Repository,
        old: &GrantTicket,
        reply: &Reply,
        wait: Duration,
    ) -> Result<Option<GrantTicket>, BlobError> {
        match auth::choose(reply.headers(), &reply.url, repository) {
            Some(scheme) => self.auth().challenged(repository, scheme, Some(old)),
            None => self.auth().refused(repository, old),
        }
        let renewed = self.auth().ticket(self.transport(), repository, wait).await;
        match renewed {
            Ok(renewed) => Ok(renewed.filter(|renewed| renewed.header != old.header)),
            // The registry's response tells the user more than the fact that there is no other login.
            Err(BlobError::Unauthorized { tried, .. }) => {
                tracing::debug!(%repository, tried, "there is no other login");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Requests the base of the API, where some registries state their scheme. Returns the scheme, if one is stated.
    async fn scheme_of_base(&self, repository: &Repository, wait: Duration) -> Result<Option<Scheme>, BlobError> {
        let base = repository.endpoint.base();
        let ask = Ask {
            settings: Arc::clone(repository.endpoint.settings()),
            ..Ask::get(base.clone())
        };
        let ping = self.send(&ask, wait).await?;
        let refused = ping.status() == StatusCode::UNAUTHORIZED && !ping.crossed;
        Ok(refused
            .then(|| auth::choose(ping.headers(), base, repository))
            .flatten())
    }
}
