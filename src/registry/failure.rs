//! Turns transport failures and error responses into [`BlobError`]s.
//!
//! An error body may be the specification's JSON, a proxy's HTML or anything else. The client reads it up to a cap
//! and reduces it to one printable line. Errors never quote URLs or headers that the client sent.

use std::error::Error as StdError;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use rustls::{CertificateError, OtherError};

use crate::blob::BlobError;

/// Most bytes read of an error body.
pub(super) const MAX_ERROR_BODY: usize = 16 * 1024;
/// Longest part of a server's message that is shown, in characters.
const MAX_MESSAGE: usize = 300;
/// Longest accepted `Retry-After`. A longer one is cut to this.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);

/// An address that the client did not connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a public address")]
pub(super) struct NotPublic(pub(super) IpAddr);

/// Turns a failure to get a response, or more of its body, into an error. `proxy` is the proxy that the request went
/// through.
pub(super) fn transport(host: &str, proxy: Option<&str>, error: reqwest::Error) -> BlobError {
    let error = error.without_url();
    let host = host.to_owned();
    // TLS errors after the handshake mean that a connection broke. Another connection may work.
    if let Some(tls) = find::<rustls::Error>(&error).filter(|_| error.is_connect()) {
        return BlobError::Tls {
            host,
            reason: tls_reason(tls),
        };
    }
    if let Some(refused) = find::<NotPublic>(&error) {
        return not_public(&host, *refused);
    }
    if error.is_builder() {
        return BlobError::Protocol {
            host,
            what: "a request".to_owned(),
            detail: innermost(&error),
            transient: false,
        };
    }
    if let Some(failed) = proxy.and_then(|proxy| through(&host, proxy, &error)) {
        return failed;
    }
    let reason = match (error.is_connect(), error.is_timeout()) {
        (true, true) => "no connection in time".to_owned(),
        (true, false) => match innermost(&error) {
            // An HTTP server without TLS causes this error if it closes the connection instead of sending plain text.
            reason if reason.contains("handshake eof") => format!("{reason} (does the registry speak plain HTTP?)"),
            reason => reason,
        },
        (false, _) => format!("connection lost: {}", innermost(&error)),
    };
    BlobError::Unreachable { host, reason }
}

/// Returns the error for a connection that failed at the proxy. None if it failed behind the proxy.
fn through(host: &str, proxy: &str, error: &reqwest::Error) -> Option<BlobError> {
    if !error.is_connect() {
        return None;
    }
    // The library does not show the type of these errors.
    let texts = causes(error);
    let tunnel = texts.iter().find_map(|text| text.strip_prefix("tunnel error: "));
    let reason = match tunnel {
        Some("proxy authorization required") => return Some(proxy_wants_login(host, proxy)),
        Some("unsuccessful") => {
            format!("the proxy {proxy} does not connect to it: it forbids that, or cannot reach it")
        }
        // Behind a tunnel, TLS begins. Without one, there is only the connection to the proxy.
        None if find::<rustls::Error>(error).is_some() || texts.iter().any(|text| text.contains("handshake")) => {
            return None;
        }
        _ => format!("no connection to the proxy {proxy}: {}", innermost(error)),
    };
    Some(BlobError::Unreachable {
        host: host.to_owned(),
        reason,
    })
}

/// Makes the error for a proxy that answers with status 407.
pub(super) fn proxy_wants_login(host: &str, proxy: &str) -> BlobError {
    BlobError::Protocol {
        host: format!("the proxy {proxy}"),
        what: format!("a request for {host}"),
        detail: "it wants a login, which belongs into the URL of the proxy: http://USER:PASSWORD@HOST".to_owned(),
        transient: false,
    }
}

/// Returns the texts of an error and its causes.
fn causes(error: &(dyn StdError + 'static)) -> Vec<String> {
    let mut texts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(cause) = next {
        texts.push(cause.to_string());
        next = cause.source();
    }
    texts
}

/// Describes why TLS failed, with the likely cause or remedy.
fn tls_reason(error: &rustls::Error) -> String {
    let hint = match error {
        rustls::Error::InvalidMessage(_) => " (does the registry speak plain HTTP?)",
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer => {
                ": nobody who is trusted here vouches for its certificate (--ca FILE trusts another authority, or this certificate)"
            }
            CertificateError::BadSignature => {
                ": its signature does not fit, or its key is too short (RSA keys need 2048 bits), or it is self-signed and not trusted (--ca FILE)"
            }
            CertificateError::Other(other) if is_self_signed(other) => {
                ": it is self-signed and not trusted (--ca FILE trusts it)"
            }
            _ => "",
        },
        _ => "",
    };
    format!("{error}{hint}")
}

/// Whether the error says that a server uses a certificate authority's certificate as its own.
fn is_self_signed(error: &OtherError) -> bool {
    let webpki = error.0.downcast_ref::<webpki::Error>();
    matches!(webpki, Some(webpki::Error::CaUsedAsEndEntity))
}

/// Returns the first error of type `E` in a chain of sources. `std::io::Error::source` skips the wrapped error, so
/// this function looks inside it.
fn find<'a, E: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        next = match error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref()) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Makes the error for a public registry that leads to an address that is not public.
pub(super) fn not_public(host: &str, refused: NotPublic) -> BlobError {
    BlobError::Protocol {
        host: host.to_owned(),
        what: "a request".to_owned(),
        detail: format!("a public registry leads there, and {refused} (--allow-private-redirects permits it)"),
        transient: false,
    }
}

fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut last = error;
    while let Some(next) = last.source() {
        last = next;
    }
    last.to_string()
}

/// The request that failed, for the error text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) host: &'a str,
    pub(super) what: &'a str,
    /// Which credentials the client used or looked for.
    pub(super) tried: &'a str,
}

/// Turns a response with an unexpected status into an error.
pub(super) fn status(context: Context<'_>, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> BlobError {
    let said = message(body);
    let host = context.host.to_owned();
    let what = context.what.to_owned();
    let said_or = |fallback: &str| {
        if said.is_empty() {
            fallback.to_owned()
        } else {
            said.clone()
        }
    };
    let with_tried = |text: String| match context.tried {
        "" => text,
        tried => format!("{text} ({tried})"),
    };
    match status {
        StatusCode::UNAUTHORIZED => BlobError::Unauthorized {
            host,
            what,
            tried: unauthorized_text(context.tried, &said),
        },
        StatusCode::FORBIDDEN => BlobError::Denied {
            host,
            what,
            message: match context.tried {
                "" => format!("{} (no login was used)", said_or("403 without a reason")),
                _ => with_tried(said_or("403 without a reason")),
            },
        },
        StatusCode::NOT_FOUND | StatusCode::GONE => BlobError::NotFound {
            what: format!("{what} at {host}"),
            hint: Some(said).filter(|said| !said.is_empty()),
        },
        StatusCode::TOO_MANY_REQUESTS => BlobError::RateLimited {
            host,
            after: retry_after(headers, SystemTime::now()),
        },
        other => BlobError::Protocol {
            host,
            what,
            detail: match (said.as_str(), other) {
                ("", other) => other.to_string(),
                // Some registries send this status when a login has expired.
                (said, StatusCode::BAD_REQUEST) => with_tried(format!("{other}: {said}")),
                (said, other) => format!("{other}: {said}"),
            },
            transient: other.is_server_error() || other == StatusCode::REQUEST_TIMEOUT,
        },
    }
}

/// Returns the text of a [`BlobError::Unauthorized`]: where credentials were looked for, and what the server said.
pub(super) fn unauthorized_text(tried: &str, said: &str) -> String {
    let tried = if tried.is_empty() {
        "no credentials were tried"
    } else {
        tried
    };
    match said {
        "" => tried.to_owned(),
        said => format!("{tried}; the server said: {said}"),
    }
}

/// Reduces an error body to one printable line: code and message of the specification's JSON, or else the text
/// without markup.
pub fn message(body: &[u8]) -> String {
    let body = &body[..body.len().min(MAX_ERROR_BODY)];
    let text = match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(json) => json_message(&json).unwrap_or_default(),
        Err(_) => strip_markup(&String::from_utf8_lossy(body)),
    };
    let mut line = String::new();
    for word in text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
    {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if line.len() > MAX_MESSAGE {
            return line.chars().take(MAX_MESSAGE).chain(['…']).collect();
        }
    }
    line
}

fn json_message(json: &serde_json::Value) -> Option<String> {
    let text = |value: &serde_json::Value, key: &str| value.get(key)?.as_str().map(str::to_owned);
    let error = match json.get("errors") {
        Some(serde_json::Value::Array(errors)) => errors.first()?,
        _ => json,
    };
    let code = text(error, "code").or_else(|| text(error, "error"));
    let message = ["message", "error_description", "details", "detail"]
        .iter()
        .find_map(|key| text(error, key));
    match (code, message) {
        (Some(code), Some(message)) if !message.is_empty() => Some(format!("{code}: {message}")),
        (code, message) => code.or(message),
    }
}

fn strip_markup(text: &str) -> String {
    let mut plain = String::new();
    let mut in_tag = false;
    for c in text.chars() {
        match c {
            '<' => in_tag = true,
            '>' if in_tag => {
                in_tag = false;
                plain.push(' ');
            }
            _ if !in_tag => plain.push(c),
            _ => {}
        }
    }
    plain
}

/// Parses `Retry-After`, given in seconds or as a date (RFC 9110 §10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let after = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text)
            .ok()?
            .duration_since(now)
            .unwrap_or_default(),
    };
    Some(after.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_of_registries_token_servers_and_proxies() {
        for (body, want) in [
            (
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{"Tag":"x"}}]}"#,
                "MANIFEST_UNKNOWN: manifest unknown",
            ),
            (r#"{"errors":[{"code":"DENIED"}]}"#, "DENIED"),
            (r#"{"errors":[]}"#, ""),
            (
                r#"{"details":"incorrect username or password"}"#,
                "incorrect username or password",
            ),
            (
                r#"{"error":"invalid_grant","error_description":"expired"}"#,
                "invalid_grant: expired",
            ),
            (
                "<html><head><title>502</title></head>\n<body>Bad\x07  Gateway</body></html>",
                "502 Bad Gateway",
            ),
            ("404 page not found\n", "404 page not found"),
            ("", ""),
        ] {
            assert_eq!(message(body.as_bytes()), want);
        }
        assert!(message("word ".repeat(1 << 20).as_bytes()).len() < 2 * MAX_MESSAGE);
    }

    #[tokio::test]
    async fn tls_trouble_after_the_handshake_is_a_lost_connection() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(config)
            .no_proxy()
            .build()
            .unwrap();
        let broken = std::io::Error::other(rustls::Error::DecryptError);
        let body = reqwest::Body::wrap_stream(futures::stream::iter([Err::<Vec<u8>, _>(broken)]));
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let error = client.post(url).body(body).send().await.unwrap_err();
        assert!(find::<rustls::Error>(&error).is_some(), "{error:?}");
        let error = transport("h", None, error);
        assert!(matches!(error, BlobError::Unreachable { .. }), "{error}");
        assert!(error.is_transient());
    }

    #[test]
    fn retry_after_in_both_forms() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers, now)
        };
        assert_eq!(parse("120"), Some(Duration::from_secs(120)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:47 GMT"), Some(Duration::from_secs(10)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(parse("99999999999"), Some(MAX_RETRY_AFTER));
        assert_eq!(parse("soon"), None);
        assert_eq!(parse("-5"), None);
    }

    #[test]
    fn statuses_become_kinds() {
        let context = Context {
            host: "h",
            what: "blob x",
            tried: "/c has no entry for h",
        };
        let kind = |code: u16| status(context, StatusCode::from_u16(code).unwrap(), &HeaderMap::new(), b"why");
        assert!(
            kind(401)
                .to_string()
                .contains("/c has no entry for h; the server said: why")
        );
        assert!(kind(403).to_string().contains("why (/c has no entry for h)"));
        assert!(matches!(kind(404), BlobError::NotFound { .. }));
        for code in [408, 429, 500, 502, 503, 504] {
            assert!(kind(code).is_transient(), "{code}");
        }
        for code in [400, 401, 403, 404, 405, 410, 418, 451] {
            assert!(!kind(code).is_transient(), "{code}");
        }
    }

    proptest! {
        #[test]
        fn messages_are_one_short_printable_line(body in proptest::collection::vec(any::<u8>(), 0..400)) {
            let line = message(&body);
            prop_assert!(!line.contains(|c: char| c.is_control()));
            prop_assert!(line.chars().count() <= MAX_MESSAGE + 1);
        }
    }
}
