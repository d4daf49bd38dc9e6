//! How long a presigned URL stays usable: a pure parser.
//!
//! Storage services state the end of validity in the query:
//! - S3 and compatible services: `X-Amz-Date` and `X-Amz-Expires`;
//! - Google: `X-Goog-Date` and `X-Goog-Expires`;
//! - CloudFront and S3 version 2: `Expires`, or a `Policy`;
//! - Azure: `se`.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use reqwest::Url;

/// Lifetime of a URL that states none. The shortest lifetime seen is about five minutes, that of ghcr's URLs.
pub(crate) const DEFAULT_LIFETIME: Duration = Duration::from_secs(4 * 60);
/// Subtracted from a stated lifetime, for clock differences and requests in flight.
const MARGIN: Duration = Duration::from_secs(15);
/// Longest trusted lifetime: S3 signs for at most seven days.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// Returns how long from `now` the URL may be used, or zero if its validity is over.
pub(crate) fn url_lifetime(url: &Url, now: SystemTime) -> Duration {
    let Some(end) = url_expiry(url) else {
        return DEFAULT_LIFETIME;
    };
    let left = end.duration_since(now).unwrap_or_default();
    left.saturating_sub(MARGIN).min(LONGEST)
}

/// Returns the end of validity that the URL states, if it states one.
pub(crate) fn url_expiry(url: &Url) -> Option<SystemTime> {
    let get = |name: &str| {
        let (_, value) = url.query_pairs().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        Some(value.into_owned())
    };
    for vendor in ["X-Amz", "X-Goog"] {
        if let (Some(date), Some(seconds)) = (get(&format!("{vendor}-Date")), get(&format!("{vendor}-Expires"))) {
            return compact_date(&date)?.checked_add(Duration::from_secs(seconds.parse().ok()?));
        }
    }
    if let Some(seconds) = get("Expires") {
        return SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds.parse().ok()?));
    }
    if let Some(date) = get("se") {
        return humantime::parse_rfc3339_weak(&date).ok();
    }
    policy_end(&get("Policy")?)
}

/// Parses `20261124T065250Z`, the basic ISO 8601 form that AWS uses.
fn compact_date(text: &str) -> Option<SystemTime> {
    if text.len() != 16 || !text.is_ascii() {
        return None;
    }
    let (date, time) = text.split_at(8);
    let extended = format!(
        "{}-{}-{}T{}:{}:{}Z",
        &date[..4],
        &date[4..6],
        &date[6..],
        &time[1..3],
        &time[3..5],
        &time[5..7]
    );
    humantime::parse_rfc3339(&extended).ok()
}

/// Reads `AWS:EpochTime` from a CloudFront custom policy. The policy is base64 with `-_~` in place of `+=/`.
fn policy_end(policy: &str) -> Option<SystemTime> {
    let base64: String = policy
        .chars()
        .map(|c| match c {
            '-' | ' ' => '+',
            '_' => '=',
            '~' => '/',
            other => other,
        })
        .collect();
    let json = base64::engine::general_purpose::STANDARD.decode(base64).ok()?;
    let policy: serde_json::Value = serde_json::from_slice(&json).ok()?;
    let seconds = policy
        .pointer("/Statement/0/Condition/DateLessThan/AWS:EpochTime")?
        .as_u64()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expiry(query: &str) -> Option<u64> {
        let url = Url::parse(&format!("https://cdn.example/blob?{query}")).unwrap();
        let end = url_expiry(&url)?;
        Some(end.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs())
    }

    #[test]
    fn every_vendor() {
        // 2026-01-02T03:04:05Z is 1767323045.
        let at = 1_767_323_045;
        assert_eq!(expiry("X-Amz-Date=20260102T030405Z&X-Amz-Expires=600"), Some(at + 600));
        assert_eq!(expiry("X-Goog-Date=20260102T030405Z&X-Goog-Expires=60"), Some(at + 60));
        assert_eq!(expiry("Expires=1767323045&Signature=x"), Some(at));
        assert_eq!(expiry("sp=r&se=2026-01-02T03%3A04%3A05Z&sig=x"), Some(at));
        let policy = base64::engine::general_purpose::STANDARD
            .encode(r#"{"Statement":[{"Condition":{"DateLessThan":{"AWS:EpochTime":1767323045}}}]}"#)
            .replace('+', "-")
            .replace('=', "_")
            .replace('/', "~");
        assert_eq!(expiry(&format!("Policy={policy}")), Some(at));
        assert_eq!(expiry("token=x"), None);
    }

    #[test]
    fn nonsense_is_not_a_date() {
        for query in [
            "X-Amz-Date=20260102T030405Z&X-Amz-Expires=-1",
            "X-Amz-Date=2026-01-02&X-Amz-Expires=60",
            "X-Amz-Date=%C3%A9%C3%A9%C3%A9%C3%A9%C3%A9%C3%A9%C3%A9%C3%A9&X-Amz-Expires=60",
            "Expires=99999999999999999999999",
            "se=tomorrow",
            "Policy=%%%",
        ] {
            assert_eq!(expiry(query), None, "{query}");
        }
    }

    #[test]
    fn lifetimes_have_a_margin_and_a_default() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let lifetime = |query: &str| url_lifetime(&Url::parse(&format!("https://c/b?{query}")).unwrap(), now);
        assert_eq!(lifetime(""), DEFAULT_LIFETIME);
        assert_eq!(lifetime("Expires=1300"), Duration::from_secs(285));
        assert_eq!(lifetime("Expires=900"), Duration::ZERO);
        assert_eq!(lifetime("Expires=99999999999"), LONGEST);
    }

    proptest! {
        #[test]
        fn never_panics(query in "[ -~]{0,120}") {
            let mut url = Url::parse("https://c/b").unwrap();
            url.set_query(Some(&query));
            let _ = url_lifetime(&url, SystemTime::now());
        }
    }
}
