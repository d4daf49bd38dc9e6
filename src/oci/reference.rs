//! Image references: `[registry/]repository[:tag][@digest]`.
//!
//! The grammar is that of the distribution project (`reference` package, v0.6), which every client accepts. The first
//! component is a registry if it has a dot, a colon or an upper-case letter. It is also a registry if it is
//! `localhost` or an IPv6 address in brackets. A reference without a registry is on `docker.io`. There, a repository
//! of one component lives under `library/`.
//!
//! A parsed reference is complete: defaults are filled in. Parsing the displayed text gives an equal reference.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use super::{Digest, DigestError, ReferenceSelector};

/// Registry of a reference that names none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Older name of the same registry, still written in credential files and scripts.
const LEGACY_DEFAULT_REGISTRY: &str = "index.docker.io";
/// Where the default registry keeps repositories of one component.
const OFFICIAL_PREFIX: &str = "library/";
/// Tag of a reference with neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Longest `registry/repository` (distribution-spec, pulling manifests).
const MAX_NAME: usize = 255;
/// Longest tag (distribution-spec, pulling manifests).
const MAX_TAG: usize = 128;
/// Most bytes of a text that is parsed. Registry, repository, tag and a SHA-512 digest take about half as many.
const MAX_TEXT: usize = 1024;

/// Names an image in a registry. After parsing, the fields hold what the grammar allows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Registry host, with a port if one was given: `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub registry: String,
    /// Repository within the registry: `library/alpine`.
    pub repository: String,
    /// Tag. None only if there is a digest.
    pub tag: Option<String>,
    /// Digest. If there is one, it alone decides which manifest is meant.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Returns how to ask the registry for the manifest.
    pub fn selector(&self) -> ReferenceSelector {
        match (&self.tag, &self.digest) {
            (None, Some(digest)) => ReferenceSelector::Digest(digest.clone()),
            (tag, digest) => ReferenceSelector::Tag {
                tag: tag.as_deref().unwrap_or(DEFAULT_TAG).to_owned(),
                digest: digest.clone(),
            },
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Which part of a reference is wrong, and why. `text` is the reference as given, cut to a printable length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Nothing, or only a registry, tag or digest.
    #[error("image reference `{text}` names no repository")]
    NoRepository {
        /// The reference.
        text: String,
    },
    /// The reference is far longer than any registry accepts.
    #[error("image reference `{text}...` is too long: {len} bytes, at most {max} are allowed for {part}")]
    TooLong {
        /// The reference, cut.
        text: String,
        /// The part that is too long.
        part: &'static str,
        /// Its length.
        len: usize,
        /// The longest allowed.
        max: usize,
    },
    /// The registry is no host name, address or port.
    #[error("registry `{registry}` in image reference `{text}` is not valid: {reason}")]
    Registry {
        /// The reference.
        text: String,
        /// Its registry part.
        registry: String,
        /// The rule that is broken.
        reason: &'static str,
    },
    /// The repository breaks the grammar.
    #[error("repository `{repository}` in image reference `{text}` is not valid: {reason}")]
    Repository {
        /// The reference.
        text: String,
        /// Its repository part.
        repository: String,
        /// The rule that is broken.
        reason: &'static str,
    },
    /// The tag breaks the grammar.
    #[error("tag `{tag}` in image reference `{text}` is not valid: {reason}")]
    Tag {
        /// The reference.
        text: String,
        /// Its tag part.
        tag: String,
        /// The rule that is broken.
        reason: &'static str,
    },
    /// What follows `@` is no digest.
    #[error("image reference `{text}`: {source}")]
    Digest {
        /// The reference.
        text: String,
        /// What is wrong with the digest.
        source: DigestError,
    },
    /// A URL in place of a reference.
    #[error("image reference `{text}` is a URL: leave out `{scheme}`")]
    Url {
        /// The reference.
        text: String,
        /// The scheme with its slashes.
        scheme: &'static str,
    },
    /// 64 hex digits: a local image ID, which registries do not know.
    #[error("`{text}` is an image ID, not a name: images are fetched by name, or by digest as NAME@sha256:{text}")]
    ImageId {
        /// The reference.
        text: String,
    },
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let parser = Parser { text };
        parser.length("a reference", text, MAX_TEXT)?;
        for scheme in ["https://", "http://"] {
            if text.starts_with(scheme) {
                return Err(ReferenceError::Url {
                    text: parser.shown(),
                    scheme,
                });
            }
        }
        let (named, digest) = match text.split_once('@') {
            Some((named, digest)) => (named, Some(parser.digest(digest)?)),
            None => (text, None),
        };
        let (name, tag) = split_tag(named);
        let tag = tag.map(|tag| parser.tag(tag)).transpose()?;
        let (registry, repository) = parser.name(name)?;
        let tag = match (tag, &digest) {
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (tag, _) => tag,
        };
        Ok(Self {
            registry,
            repository,
            tag,
            digest,
        })
    }
}

/// Splits at the colon after the last slash; an earlier colon belongs to a port.
fn split_tag(named: &str) -> (&str, Option<&str>) {
    let last = named.rfind('/').map_or(0, |slash| slash + 1);
    if named[last..].starts_with('[') {
        return (named, None);
    }
    match named[last..].find(':') {
        Some(colon) => (&named[..last + colon], Some(&named[last + colon + 1..])),
        None => (named, None),
    }
}

/// Checks the parts of one reference, and quotes the reference in errors.
struct Parser<'a> {
    text: &'a str,
}

impl Parser<'_> {
    fn shown(&self) -> String {
        cut(self.text)
    }

    fn length(&self, part: &'static str, value: &str, max: usize) -> Result<(), ReferenceError> {
        if value.len() > max {
            return Err(ReferenceError::TooLong {
                text: self.shown(),
                part,
                len: value.len(),
                max,
            });
        }
        Ok(())
    }

    fn digest(&self, digest: &str) -> Result<Digest, ReferenceError> {
        digest.parse().map_err(|source| ReferenceError::Digest {
            text: self.shown(),
            source,
        })
    }

    fn tag(&self, tag: &str) -> Result<String, ReferenceError> {
        self.length("the tag", tag, MAX_TAG)?;
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let reason = match tag.as_bytes() {
            [] => "it is empty",
            [first, ..] if !word(*first) => "it must begin with a letter, a digit or `_`",
            bytes if !bytes.iter().all(|&b| word(b) || b == b'.' || b == b'-') => {
                "only letters, digits, `_`, `.` and `-` are allowed"
            }
            _ => return Ok(tag.to_owned()),
        };
        Err(ReferenceError::Tag {
            text: self.shown(),
            tag: cut(tag),
            reason,
        })
    }

    fn name(&self, name: &str) -> Result<(String, String), ReferenceError> {
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if is_registry(first) => (Some(first), rest),
            _ if name.starts_with('[') => (Some(name), ""),
            _ => (None, name),
        };
        let registry = match registry {
            Some(LEGACY_DEFAULT_REGISTRY) | None => DEFAULT_REGISTRY,
            Some(registry) => {
                self.registry(registry)?;
                registry
            }
        };
        if path.is_empty() {
            return Err(ReferenceError::NoRepository { text: self.shown() });
        }
        // The distribution project refuses an ID only if the text is nothing else. In any other case, the error would
        // not help.
        if self.text.len() == 64 && self.text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ReferenceError::ImageId { text: self.shown() });
        }
        self.repository(path)?;
        let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
            format!("{OFFICIAL_PREFIX}{path}")
        } else {
            path.to_owned()
        };
        let name_len = registry.len() + 1 + repository.len();
        if name_len > MAX_NAME {
            return Err(ReferenceError::TooLong {
                text: self.shown(),
                part: "registry and repository",
                len: name_len,
                max: MAX_NAME,
            });
        }
        Ok((registry.to_owned(), repository))
    }

    fn registry(&self, registry: &str) -> Result<(), ReferenceError> {
        registry_fault(registry).map_or(Ok(()), |reason| {
            Err(ReferenceError::Registry {
                text: self.shown(),
                registry: cut(registry),
                reason,
            })
        })
    }

    fn repository(&self, path: &str) -> Result<(), ReferenceError> {
        path.split('/').find_map(component_fault).map_or(Ok(()), |reason| {
            Err(ReferenceError::Repository {
                text: self.shown(),
                repository: cut(path),
                reason,
            })
        })
    }
}

fn cut(text: &str) -> String {
    text.chars().take(160).collect()
}

fn is_registry(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':', '[']) || first.bytes().any(|b| b.is_ascii_uppercase())
}

/// Returns what is wrong with `host[:port]`.
fn registry_fault(registry: &str) -> Option<&'static str> {
    let (host, port) = if let Some(rest) = registry.strip_prefix('[') {
        let Some((address, after)) = rest.split_once(']') else {
            return Some("the bracket of the IPv6 address is not closed");
        };
        if address.parse::<Ipv6Addr>().is_err() {
            return Some("what stands in brackets is no IPv6 address");
        }
        match after.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if after.is_empty() => (None, None),
            None => return Some("only a port may follow the IPv6 address"),
        }
    } else {
        match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        }
    };
    if let Some(port) = port {
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        if !digits || port.parse::<u16>().unwrap_or(0) == 0 {
            return Some("the port must be a number from 1 to 65535");
        }
    }
    host?.split('.').find_map(|label| {
        if label.is_empty() {
            Some("a part of the host name is empty")
        } else if !label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            Some("host names hold only letters, digits, `-` and `.`; IPv6 addresses go in brackets")
        } else if label.starts_with('-') || label.ends_with('-') {
            Some("a part of the host name begins or ends with `-`")
        } else {
            None
        }
    })
}

/// Returns what is wrong with one component of a repository: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn component_fault(component: &str) -> Option<&'static str> {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if bytes.iter().any(u8::is_ascii_uppercase) {
        return Some("it must be lower-case");
    }
    if !bytes.iter().all(|&b| alphanumeric(b) || b"._-".contains(&b)) {
        return Some("only lower-case letters, digits, `.`, `_`, `-` and `/` are allowed");
    }
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return Some("a component between slashes is empty");
    };
    if !alphanumeric(first) || !alphanumeric(last) {
        return Some("each component must begin and end with a letter or digit");
    }
    let separators = component
        .split(|c: char| c.is_ascii_alphanumeric())
        .filter(|s| !s.is_empty());
    for separator in separators {
        if !matches!(separator, "." | "_" | "__") && separator.bytes().any(|b| b != b'-') {
            return Some("letters and digits may be joined by one `.`, one or two `_`, or any number of `-`");
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    /// Accepted references and their complete form. `D` stands for a SHA-256 digest.
    const GOOD: &[(&str, &str)] = &[
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("alpine@D", "docker.io/library/alpine@D"),
        ("alpine:3.20@D", "docker.io/library/alpine:3.20@D"),
        ("library/alpine", "docker.io/library/alpine:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("docker.io/library/alpine:latest", "docker.io/library/alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/user/app:1", "docker.io/user/app:1"),
        ("user/app", "docker.io/user/app:latest"),
        ("user/group/app", "docker.io/user/group/app:latest"),
        ("localhost", "docker.io/library/localhost:latest"),
        ("localhost:5000", "docker.io/library/localhost:5000"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("localhost:5000/app:1.0", "localhost:5000/app:1.0"),
        ("localhost:5000/a/b/c@D", "localhost:5000/a/b/c@D"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
        ("10.0.0.1/app", "10.0.0.1/app:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("[::1]/x:y", "[::1]/x:y"),
        ("[2001:db8::1]:443/a/b:t@D", "[2001:db8::1]:443/a/b:t@D"),
        ("[2001:DB8::1]/a", "[2001:DB8::1]/a:latest"),
        ("[::ffff:10.0.0.1]:80/a", "[::ffff:10.0.0.1]:80/a:latest"),
        ("ghcr.io/owner/app", "ghcr.io/owner/app:latest"),
        ("registry.example.com:8443/x/y:z", "registry.example.com:8443/x/y:z"),
        ("host:65535/x", "host:65535/x:latest"),
        ("Host/x", "Host/x:latest"),
        ("HOST:80/x", "HOST:80/x:latest"),
        ("xn--bcher-kva.example/x", "xn--bcher-kva.example/x:latest"),
        ("a.b-c.d/x", "a.b-c.d/x:latest"),
        ("registry/app", "docker.io/registry/app:latest"),
        ("foo_bar", "docker.io/library/foo_bar:latest"),
        ("foo__bar", "docker.io/library/foo__bar:latest"),
        ("foo--bar", "docker.io/library/foo--bar:latest"),
        ("foo---bar/a.b", "docker.io/foo---bar/a.b:latest"),
        ("foo_bar/app", "docker.io/foo_bar/app:latest"),
        ("0/1", "docker.io/0/1:latest"),
        ("a:_", "docker.io/library/a:_"),
        ("a:A.-_9", "docker.io/library/a:A.-_9"),
        ("a:latest", "docker.io/library/a:latest"),
        ("quay.io/a:sha256-0123", "quay.io/a:sha256-0123"),
        ("localhost/HEX", "localhost/HEX:latest"),
        ("docker.io/HEX", "docker.io/library/HEX:latest"),
        ("user/HEX", "docker.io/user/HEX:latest"),
    ];

    /// Refused references and a word of the reason.
    const BAD: &[(&str, &str)] = &[
        ("", "names no repository"),
        (":tag", "names no repository"),
        ("@D", "names no repository"),
        ("localhost:5000/", "names no repository"),
        ("docker.io/", "names no repository"),
        ("[::1]:5000", "names no repository"),
        ("https://docker.io/alpine", "leave out `https://`"),
        ("http://localhost:5000/a", "leave out `http://`"),
        ("HEX", "image ID"),
        ("Alpine", "lower-case"),
        ("alpine/Base", "lower-case"),
        ("docker.io/Library/alpine", "lower-case"),
        ("alpine:", "tag `` in"),
        ("alpine:-x", "must begin with"),
        ("alpine:.x", "must begin with"),
        ("alpine:a b", "only letters"),
        ("alpine:a:b", "only letters"),
        ("alpine:\u{e9}", "must begin with"),
        ("alpine@", "is not a digest"),
        ("alpine@sha256", "is not a digest"),
        ("alpine@sha256:abc", "is not a digest"),
        ("alpine@md5:abc", "md5"),
        ("alpine@D@D", "is not a digest"),
        ("alpine:1@sha256:ABCDEF", "is not a digest"),
        ("foo..bar", "may be joined"),
        ("foo___bar", "may be joined"),
        ("foo._bar", "may be joined"),
        ("foo-_bar", "may be joined"),
        ("-foo", "begin and end"),
        ("foo-", "begin and end"),
        ("foo/.bar", "begin and end"),
        ("foo/_", "begin and end"),
        ("..", "begin and end"),
        ("../etc/passwd", "a part of the host name is empty"),
        ("a/../b", "begin and end"),
        ("a//b", "is empty"),
        ("/a", "is empty"),
        ("a/", "is empty"),
        ("a/b/:t", "is empty"),
        ("a b", "are allowed"),
        ("caf\u{e9}", "are allowed"),
        ("a\0b", "are allowed"),
        ("host:/a", "the port"),
        ("host:0/a", "the port"),
        ("host:65536/a", "the port"),
        ("host:+80/a", "the port"),
        ("host:http/a", "the port"),
        ("a:b:c/d", "the port"),
        ("-host.com/a", "begins or ends with"),
        ("host-.com/a", "begins or ends with"),
        ("host..com/a", "host name is empty"),
        (".com/a", "host name is empty"),
        ("ho_st.com/a", "host names hold only"),
        ("::1/a", "the port"),
        ("user@host.com/a", "is not a digest"),
        ("[::1/a", "not closed"),
        ("[::1]x/a", "only a port"),
        ("[::1]:/a", "the port"),
        ("[host]/a", "no IPv6 address"),
        ("[fe80::1%eth0]/a", "no IPv6 address"),
        ("[]/a", "no IPv6 address"),
    ];

    fn expand(text: &str) -> String {
        text.replace("HEX", HEX).replace("@D", &format!("@sha256:{HEX}"))
    }

    #[test]
    fn good_references_are_completed() {
        for (text, complete) in GOOD {
            let reference: Reference = expand(text).parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(reference.to_string(), expand(complete), "{text}");
            assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference, "{text}");
        }
    }

    #[test]
    fn bad_references_say_which_part_is_wrong() {
        for (text, word) in BAD {
            let error = expand(text).parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(&expand(word)), "{text}: {error}");
        }
    }

    #[test]
    fn lengths_are_limited() {
        let of = |text: String| text.parse::<Reference>();
        assert!(of(format!("a:{}", "t".repeat(128))).is_ok());
        assert!(matches!(
            of(format!("a:{}", "t".repeat(129))),
            Err(ReferenceError::TooLong { max: 128, .. })
        ));
        assert!(of(format!("localhost/{}", "r".repeat(245))).is_ok());
        assert!(matches!(
            of(format!("localhost/{}", "r".repeat(246))),
            Err(ReferenceError::TooLong { len: 256, .. })
        ));
        // `docker.io/library/` counts as well.
        assert!(of("r".repeat(237)).is_ok());
        assert!(of("r".repeat(238)).is_err());
        assert!(of("r".repeat(1 << 20)).unwrap_err().to_string().len() < 300);
    }

    #[test]
    fn the_selector_keeps_tag_and_digest() {
        let digest: Digest = format!("sha256:{HEX}").parse().unwrap();
        let select = |text: &str| expand(text).parse::<Reference>().unwrap().selector();
        assert_eq!(
            select("a"),
            ReferenceSelector::Tag {
                tag: "latest".into(),
                digest: None
            }
        );
        assert_eq!(select("a@D"), ReferenceSelector::Digest(digest.clone()));
        assert_eq!(
            select("a:t@D"),
            ReferenceSelector::Tag {
                tag: "t".into(),
                digest: Some(digest)
            }
        );
    }

    fn any_reference() -> impl Strategy<Value = Reference> {
        let component = "[a-z0-9]{1,4}((\\.|_|__|-{1,3})[a-z0-9]{1,3}){0,2}";
        (
            prop_oneof![
                Just("docker.io".to_owned()),
                "localhost(:[1-9][0-9]{0,3})?",
                "[a-z0-9]{1,5}\\.[a-zA-Z0-9]{1,4}(:[1-9][0-9]{0,3})?",
                "\\[[0-9a-f]{1,4}::[0-9a-f]{1,4}\\](:[1-9][0-9]{0,3})?",
            ],
            proptest::collection::vec(component, 2..4),
            proptest::option::of("[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}"),
            proptest::option::of("[0-9a-f]{64}"),
        )
            .prop_map(|(registry, path, tag, hex)| {
                let digest: Option<Digest> = hex.map(|hex| format!("sha256:{hex}").parse().unwrap());
                let tag = tag.or_else(|| digest.is_none().then(|| "latest".to_owned()));
                Reference {
                    registry,
                    repository: path.join("/"),
                    tag,
                    digest,
                }
            })
    }

    proptest! {
        #[test]
        fn parsing_what_is_displayed_gives_the_same(reference in any_reference()) {
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }

        #[test]
        fn random_text_never_panics_and_round_trips_when_accepted(text in "[a-zA-Z0-9:/@.\\[\\]_ é-]{0,40}|\\PC{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
