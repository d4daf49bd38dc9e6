//! State and answers of the registry without faults.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ocifs::oci::Digest;

use super::faults::{Fault, Ranging};
use super::wire::{Answer, Request};
use super::{Guard, Issuer, Logged, Shared};

#[derive(Default)]
pub(super) struct State {
    pub(super) blobs: HashMap<String, Vec<u8>>,
    /// Media type and bytes by `repository:reference`.
    pub(super) manifests: HashMap<String, (String, Vec<u8>)>,
    pub(super) tags: HashMap<String, Vec<String>>,
    pub(super) rules: Vec<(String, usize, Fault)>,
    pub(super) guard: Guard,
    pub(super) issuer: Option<Arc<Issuer>>,
    /// Remaining uses of each token.
    pub(super) tokens: HashMap<String, usize>,
    pub(super) issued: usize,
    pub(super) storage: Option<Storage>,
    /// Remaining uses of each storage ticket.
    pub(super) tickets: HashMap<String, usize>,
    pub(super) latency: Duration,
    /// Status of the answer to wrong credentials, if it is not a 401 with a challenge.
    pub(super) refusal: Option<u16>,
    pub(super) log: Vec<Logged>,
}

/// Target of redirected blob requests.
#[derive(Clone)]
pub(super) struct Storage {
    pub(super) shared: Arc<Shared>,
    pub(super) host: String,
    pub(super) uses: usize,
    pub(super) query: String,
    pub(super) hops: usize,
}

impl State {
    pub(super) fn answer(&mut self, request: &Request, ranging: &Ranging) -> Answer {
        if request.path() == "/token" {
            return self.token(request);
        }
        if let Some(rest) = request.path().strip_prefix("/storage/") {
            return self.stored(request, rest, ranging);
        }
        let Some(rest) = request.path().strip_prefix("/v2/") else {
            return Answer::error(404, "NAME_UNKNOWN");
        };
        if let Some(refusal) = self.refuse(request) {
            return refusal;
        }
        if rest.is_empty() {
            return Answer::new(200).body("{}");
        }
        if let Some(answer) = self.upload(request, rest) {
            return answer;
        }
        if let Some(repository) = rest.strip_suffix("/tags/list") {
            return match self.tags.get(repository) {
                Some(tags) => Answer::new(200).body(serde_json::json!({"name": repository, "tags": tags}).to_string()),
                None => Answer::error(404, "NAME_UNKNOWN"),
            };
        }
        if let Some((repository, reference)) = rest.split_once("/manifests/") {
            return match self.manifests.get(&format!("{repository}:{reference}")) {
                Some((media_type, bytes)) => Answer::new(200)
                    .header("Content-Type", media_type)
                    .header("Docker-Content-Digest", Digest::of(bytes).to_string())
                    .body(bytes.clone()),
                None if self.tags.contains_key(repository) => Answer::error(404, "MANIFEST_UNKNOWN"),
                None => Answer::error(404, "NAME_UNKNOWN"),
            };
        }
        match rest.split_once("/blobs/") {
            Some((_, digest)) => self.blob(request, digest, ranging),
            None => Answer::error(404, "NAME_UNKNOWN"),
        }
    }

    /// Answers the requests of an upload.
    fn upload(&mut self, request: &Request, rest: &str) -> Option<Answer> {
        match request.method.as_str() {
            "POST" => {
                let repository = rest.strip_suffix("/blobs/uploads/")?;
                let place = format!("/v2/{repository}/blobs/uploads/1?state=begun");
                Some(Answer::new(202).header("Location", place))
            }
            "PUT" => match rest.split_once("/manifests/") {
                Some((repository, reference)) => {
                    let media_type = request.headers.get("content-type").cloned().unwrap_or_default();
                    let document = (media_type, request.body.clone());
                    self.tags.entry(repository.to_owned()).or_default();
                    self.manifests.insert(format!("{repository}:{reference}"), document);
                    Some(Answer::new(201))
                }
                None => {
                    let digest = request.query("digest").unwrap_or_default();
                    if digest != Digest::of(&request.body).to_string() {
                        return Some(Answer::error(400, "DIGEST_INVALID"));
                    }
                    self.blobs.insert(digest, request.body.clone());
                    Some(Answer::new(201))
                }
            },
            _ => None,
        }
    }

    fn blob(&mut self, request: &Request, digest: &str, ranging: &Ranging) -> Answer {
        let Some(bytes) = self.blobs.get(digest) else {
            return Answer::error(404, "BLOB_UNKNOWN");
        };
        let Some(storage) = &self.storage else {
            return ranged(request, bytes, ranging);
        };
        let mut target = storage.shared.state.lock().unwrap();
        target.blobs.insert(digest.to_owned(), bytes.clone());
        let ticket = format!("t{}", target.tickets.len());
        target.tickets.insert(ticket.clone(), storage.uses);
        let Storage { host, query, hops, .. } = storage;
        Answer::new(307).body("<a href=\"x\">Temporary Redirect</a>.\n").header(
            "Location",
            format!("http://{host}/storage/{digest}?ticket={ticket}&hops={hops}&{query}"),
        )
    }

    fn stored(&mut self, request: &Request, digest: &str, ranging: &Ranging) -> Answer {
        let hops: usize = request.query("hops").unwrap_or_default().parse().unwrap_or(0);
        if hops > 1 {
            let next = request
                .target
                .replace(&format!("hops={hops}"), &format!("hops={}", hops - 1));
            return Answer::new(302).header("Location", next);
        }
        if !matches!(self.guard, Guard::Open) {
            if let Some(refusal) = self.refuse(request) {
                return refusal;
            }
        } else if request.headers.contains_key("authorization") {
            return Answer::new(400).body("<Error><Code>InvalidArgument</Code></Error>");
        }
        let uses = self.tickets.get_mut(&request.query("ticket").unwrap_or_default());
        match (uses, self.blobs.get(digest)) {
            (Some(uses), Some(bytes)) if *uses > 0 => {
                *uses -= 1;
                ranged(request, bytes, ranging)
            }
            _ => {
                Answer::new(403).body("<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
            }
        }
    }

    /// Returns the 401 for a request without the required credentials.
    fn refuse(&mut self, request: &Request) -> Option<Answer> {
        let shown = request.headers.get("authorization").cloned().unwrap_or_default();
        let host = request.headers.get("host").cloned().unwrap_or_default();
        let refusal = Answer::error(401, "UNAUTHORIZED");
        let refused = self.refusal.filter(|_| !shown.is_empty());
        let refused = refused.map(|code| {
            let text = "Your authorization token has expired. Reauthenticate and try again.";
            let body = serde_json::json!({"errors": [{"code": "DENIED", "message": text}]});
            Answer::new(code).body(body.to_string())
        });
        match self.guard.clone() {
            Guard::Open => None,
            Guard::Basic(user, password) => {
                let challenge = || refusal.header("WWW-Authenticate", "Basic realm=\"test\"");
                (shown != basic(&user, &password)).then(|| refused.unwrap_or_else(challenge))
            }
            Guard::Bearer(tokens) => {
                let token = shown.strip_prefix("Bearer ").unwrap_or_default();
                let writes = matches!(request.method.as_str(), "POST" | "PUT");
                let may = !writes || token.ends_with("push");
                if let Some(uses) = self.tokens.get_mut(token).filter(|uses| may && **uses > 0) {
                    *uses -= 1;
                    return None;
                }
                if refused.is_some() {
                    return refused;
                }
                if tokens.challenge_at_base_only && request.path() != "/v2/" {
                    return Some(refusal);
                }
                let scope = match request.path().strip_prefix("/v2/").and_then(|rest| {
                    let cut = ["/manifests/", "/blobs/", "/tags/"]
                        .iter()
                        .find_map(|part| rest.find(part))?;
                    Some(&rest[..cut])
                }) {
                    Some(repository) => {
                        let actions = if writes { "pull,push" } else { "pull" };
                        format!(",scope=\"repository:{repository}:{actions}\"")
                    }
                    None => String::new(),
                };
                let realm = tokens.realm.unwrap_or_else(|| format!("http://{host}/token"));
                let challenge = format!("Bearer realm=\"{realm}\",service=\"test\"{scope}");
                Some(refusal.header("WWW-Authenticate", challenge))
            }
        }
    }

    fn token(&mut self, request: &Request) -> Answer {
        if let Some(issuer) = &self.issuer {
            let token = issuer(&request.query("scope").unwrap_or_default());
            return Answer::new(200).body(serde_json::json!({"token": token, "expires_in": 300}).to_string());
        }
        let Guard::Bearer(tokens) = self.guard.clone() else {
            return Answer::new(404);
        };
        let shown = request.headers.get("authorization").cloned();
        let welcome = match (&tokens.login, &tokens.identity) {
            (None, None) => true,
            (Some((user, password)), _) if request.method == "GET" => shown == Some(basic(user, password)),
            (_, Some(identity)) if request.method == "POST" => {
                request.text().contains(&format!("refresh_token={identity}"))
                    && request.text().contains("grant_type=refresh_token")
            }
            _ => false,
        };
        if !welcome {
            return Answer::new(401).body(r#"{"details":"incorrect username or password"}"#);
        }
        self.issued += 1;
        let scope = request.query("scope").unwrap_or_default();
        let token = format!(
            "token-{}{}",
            self.issued,
            if scope.contains("push") { "-push" } else { "" }
        );
        self.tokens.insert(token.clone(), tokens.uses);
        let answer = serde_json::json!({"token": token, "expires_in": tokens.expires_in});
        Answer::new(200).body(answer.to_string())
    }
}

fn basic(user: &str, password: &str) -> String {
    use base64::Engine as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {encoded}")
}

fn ranged(request: &Request, bytes: &[u8], ranging: &Ranging) -> Answer {
    let whole = Answer::new(200).header("Content-Type", "application/octet-stream");
    let range = request.headers.get("range").filter(|_| *ranging != Ranging::Ignored);
    let Some(range) = range else {
        return whole.body(bytes);
    };
    let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let mut first: usize = first.parse().unwrap();
    let mut last: usize = last.parse().unwrap_or(usize::MAX).min(bytes.len().saturating_sub(1));
    if first >= bytes.len() {
        return Answer::new(416).header("Content-Range", format!("bytes */{}", bytes.len()));
    }
    if let Ranging::Wide(block) = ranging {
        first = first / block * block;
        last = ((last / block + 1) * block).min(bytes.len()) - 1;
    }
    let body = match ranging {
        Ranging::Other => bytes[first..=last].iter().map(|byte| byte.wrapping_add(1)).collect(),
        Ranging::Whole => bytes.to_vec(),
        _ => bytes[first..=last].to_vec(),
    };
    Answer::new(206)
        .header("Content-Range", format!("bytes {first}-{last}/{}", bytes.len()))
        .body(body)
}
