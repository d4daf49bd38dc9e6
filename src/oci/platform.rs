//! Platforms: how they are written, which of them are equal, and which entry of an image index a host takes.
//!
//! Normalisation and preference follow containerd's `platforms` package. ocifs therefore chooses the manifest that
//! container engines choose. Everything here is a function of its arguments, except [`Platform::host`].

use std::fmt;
use std::str::FromStr;

use super::{Descriptor, Platform, is_companion, shown};

/// Why a text names no platform, or why an image index has no entry for a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlatformError {
    /// Not `OS/ARCH[/VARIANT]` or `ARCH`.
    #[error("`{text}` is not a platform: want OS/ARCH, OS/ARCH/VARIANT or ARCH, such as linux/arm64")]
    Malformed {
        /// The text, cut to a printable length.
        text: String,
    },
    /// A variant that the architecture does not have.
    #[error(
        "`{text}` is not a platform: {architecture} has no variant `{variant}`{}",
        known_variants(architecture)
    )]
    UnknownVariant {
        /// The text.
        text: String,
        /// Its architecture.
        architecture: String,
        /// Its variant.
        variant: String,
    },
    /// No entry fits.
    #[error("no image for {wanted}: {}", Available(available))]
    NoMatch {
        /// The platform that was wanted.
        wanted: Box<Platform>,
        /// The platforms in the index, in order, without repeats.
        available: Vec<Platform>,
    },
}

/// Most platforms an error lists.
const MAX_LISTED: usize = 20;

struct Available<'a>(&'a [Platform]);

impl fmt::Display for Available<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("the image index lists none for any platform");
        }
        f.write_str("the image index has ")?;
        for (i, platform) in self.0.iter().take(MAX_LISTED).enumerate() {
            write!(f, "{}{platform}", if i == 0 { "" } else { ", " })?;
        }
        if self.0.len() > MAX_LISTED {
            write!(f, " and {} more", self.0.len() - MAX_LISTED)?;
        }
        f.write_str("; choose one with --platform")
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", shown(&self.os), shown(&self.architecture))?;
        match self.variant.as_deref() {
            Some(variant) if !variant.is_empty() => write!(f, "/{}", shown(variant))?,
            _ => {}
        }
        for (i, feature) in self.os_features.iter().enumerate() {
            write!(
                f,
                "{}{}",
                if i == 0 { " with os.features " } else { ", " },
                shown(feature)
            )?;
        }
        Ok(())
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    /// Parses `OS/ARCH[/VARIANT]`, or `ARCH` for Linux; the result is normalised.
    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let word = |part: &str| {
            (1..=64).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
        };
        let parts: Vec<&str> = text.splitn(4, '/').collect();
        let (os, architecture, variant) = match parts[..] {
            [architecture] => ("linux", architecture, None),
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant)),
            _ => ("", "", None),
        };
        if ![os, architecture].into_iter().chain(variant).all(word) {
            return Err(PlatformError::Malformed {
                text: text.chars().take(160).collect(),
            });
        }
        let platform = Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
            ..Self::default()
        };
        let platform = platform.normalized();
        match (&platform.variant, platform.has_known_variant()) {
            (Some(variant), false) => Err(PlatformError::UnknownVariant {
                text: text.to_owned(),
                architecture: platform.architecture.clone(),
                variant: variant.clone(),
            }),
            _ => Ok(platform),
        }
    }
}

/// Returns a list of an architecture's variants, for an error.
fn known_variants(architecture: &str) -> &'static str {
    match architecture {
        "amd64" => " (it has v1 to v4)",
        "arm" => " (it has v5 to v8)",
        "arm64" => " (it has v8, v8.1 to v8.9, v9 and v9.1 to v9.7)",
        _ => "",
    }
}

impl Platform {
    /// Returns Linux on this machine's processor.
    ///
    /// On amd64 there is no variant, whatever the processor can do. Container engines do the same, so a reference
    /// means the same manifest on every amd64 host.
    pub fn host() -> Self {
        let little = cfg!(target_endian = "little");
        let architecture = match std::env::consts::ARCH {
            "x86" => "386",
            "powerpc64" if little => "ppc64le",
            "powerpc64" => "ppc64",
            "loongarch64" => "loong64",
            "mips64" if little => "mips64le",
            other => other,
        };
        let platform = Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            ..Self::default()
        };
        platform.normalized()
    }

    /// Returns the same platform in its one normal form.
    pub fn normalized(&self) -> Self {
        let os = match self.os.to_ascii_lowercase().as_str() {
            "" => "linux".to_owned(),
            "macos" => "darwin".to_owned(),
            os => os.to_owned(),
        };
        let architecture = self.architecture.to_ascii_lowercase();
        let variant = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = normal_cpu(&architecture, &variant);
        Self {
            os,
            architecture: architecture.to_owned(),
            variant: (!variant.is_empty()).then(|| variant.to_owned()),
            os_version: self.os_version.clone(),
            os_features: self.os_features.clone(),
        }
    }

    /// Returns whether the variant of this (normalised) platform is one that its architecture has. For architectures
    /// other than amd64, arm and arm64, any variant counts as known.
    fn has_known_variant(&self) -> bool {
        let Some(variant) = self.variant.as_deref() else {
            return true;
        };
        match (self.architecture.as_str(), version(variant)) {
            ("amd64", Some((1..=4, None))) => true,
            ("arm", Some((5..=8, None))) => true,
            ("arm64", Some((8, None | Some(0..=9)) | (9, None | Some(0..=7)))) => true,
            ("amd64" | "arm" | "arm64", _) => false,
            _ => true,
        }
    }

    /// Returns the level of `offered` in the preferences of this (wanted, normalised) platform: 0 is best. Returns
    /// none if this platform does not run `offered`.
    fn preference(&self, offered: &Platform) -> Option<usize> {
        let offered = offered.normalized();
        let features_met = offered.os_features.iter().all(|f| self.os_features.contains(f));
        if offered.os != self.os || !features_met {
            return None;
        }
        let variant = offered.variant.as_deref().unwrap_or_default();
        match self.levels() {
            Some(levels) => levels
                .iter()
                .position(|(a, v)| *a == offered.architecture && v == variant),
            None => {
                let own = self.variant.as_deref().unwrap_or_default();
                let fits = own == variant || own.is_empty() || variant.is_empty();
                (offered.architecture == self.architecture && fits).then_some(0)
            }
        }
    }

    /// Returns the architectures and variants that this platform runs, best first. Returns none if no such order is
    /// known; [`Platform::preference`] then takes equal variants, and a missing one on either side.
    fn levels(&self) -> Option<Vec<(&'static str, String)>> {
        let variant = self.variant.as_deref().unwrap_or_default();
        let arm = |from: u32| (5..=from).rev().map(|v| ("arm", format!("v{v}")));
        match self.architecture.as_str() {
            "amd64" => {
                let (major, None) = version(if variant.is_empty() { "v1" } else { variant })? else {
                    return None;
                };
                let mut levels: Vec<_> = (2..=major).rev().map(|v| ("amd64", format!("v{v}"))).collect();
                levels.extend([("amd64", String::new()), ("386", String::new())]);
                Some(levels)
            }
            "arm64" => {
                let (major, minor) = version(if variant.is_empty() { "v8" } else { variant })?;
                let minor = minor.unwrap_or(0);
                let mut levels = Vec::new();
                let v8_minor = match major {
                    8 => minor,
                    9 => {
                        levels.extend((0..=minor).rev().map(|m| ("arm64", minor_variant(9, m))));
                        // Armv9.x implies the features of Armv8.(x+5) (Arm ARM, A2.2).
                        minor + 5
                    }
                    _ => return None,
                };
                levels.extend((0..=v8_minor).rev().map(|m| ("arm64", minor_variant(8, m))));
                levels.extend(arm(8));
                Some(levels)
            }
            "arm" => match version(variant)? {
                (major @ 5..=8, None) => Some(arm(major).collect()),
                _ => None,
            },
            _ => None,
        }
    }
}

/// A normalised arm64 variant.
fn minor_variant(major: u32, minor: u32) -> String {
    match (major, minor) {
        (8, 0) => String::new(),
        (_, 0) => format!("v{major}"),
        _ => format!("v{major}.{minor}"),
    }
}

/// Splits `vMAJOR[.MINOR]`. Numbers of more than two digits do not exist, and would only make long lists.
fn version(variant: &str) -> Option<(u32, Option<u32>)> {
    let number = |text: &str| {
        let digits = (1..=2).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()
    };
    let version = variant.strip_prefix('v')?;
    match version.split_once('.') {
        Some((major, minor)) => Some((number(major)?, Some(number(minor)?))),
        None => Some((number(version)?, None)),
    }
}

/// Applies the normalisation table of containerd to lower-case text.
fn normal_cpu<'a>(architecture: &'a str, variant: &'a str) -> (&'a str, &'a str) {
    match (architecture, variant) {
        ("amd64" | "x86_64" | "x86-64", "v1") => ("amd64", ""),
        ("amd64" | "x86_64" | "x86-64", _) => ("amd64", variant),
        ("386" | "i386" | "i486" | "i586" | "i686" | "80386", _) => ("386", ""),
        ("arm64" | "aarch64", "8" | "v8" | "v8.0") => ("arm64", ""),
        ("arm64" | "aarch64", "9" | "9.0" | "v9.0") => ("arm64", "v9"),
        ("arm64" | "aarch64", _) => ("arm64", variant),
        ("armhf", _) => ("arm", "v7"),
        ("armel", _) => ("arm", "v6"),
        ("arm", "" | "7") => ("arm", "v7"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "6") => ("arm", "v6"),
        ("arm", "8") => ("arm", "v8"),
        other => other,
    }
}

/// Returns the entry of an image index that a host of platform `wanted` takes: the earliest of those at the best
/// level. Skips entries that are not images (`is_companion`), and entries without a platform.
pub fn choose<'a>(entries: &'a [Descriptor], wanted: &Platform) -> Result<&'a Descriptor, PlatformError> {
    let wanted = wanted.normalized();
    let offers = || {
        let images = entries.iter().filter(|entry| !is_companion(entry));
        images.filter_map(|entry| has_platform(entry).map(|platform| (entry, platform)))
    };
    let ranked = offers().filter_map(|(entry, platform)| Some((wanted.preference(platform)?, entry)));
    // `min_by_key` returns the first of equals.
    match ranked.min_by_key(|(level, _)| *level) {
        Some((_, entry)) => Ok(entry),
        None => {
            let mut available: Vec<Platform> = Vec::new();
            for (_, platform) in offers() {
                let platform = platform.normalized();
                if !available.contains(&platform) {
                    available.push(platform);
                }
            }
            Err(PlatformError::NoMatch {
                wanted: Box::new(wanted),
                available,
            })
        }
    }
}

/// Returns whether a host of platform `wanted` would take an image for `offered`.
pub fn runs(wanted: &Platform, offered: &Platform) -> bool {
    wanted.normalized().preference(offered).is_some()
}

/// Returns the platform of an index entry, if the entry names an architecture.
pub(crate) fn has_platform(entry: &Descriptor) -> Option<&Platform> {
    entry.platform.as_ref().filter(|p| !p.architecture.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::oci::{Digest, media_type};

    fn entry(platform: &str) -> Descriptor {
        let mut parts = platform.splitn(3, '/').map(str::to_owned);
        Descriptor {
            media_type: media_type::OCI_MANIFEST.into(),
            digest: Digest::of(platform.as_bytes()),
            size: 1,
            urls: vec![],
            annotations: BTreeMap::new(),
            data: None,
            artifact_type: None,
            platform: (!platform.is_empty()).then(|| Platform {
                os: parts.next().unwrap(),
                architecture: parts.next().unwrap(),
                variant: parts.next(),
                ..Platform::default()
            }),
        }
    }

    fn wanted(text: &str) -> Platform {
        text.parse().unwrap()
    }

    /// Returns which of `offered` is taken. The order of `offered` must not matter.
    fn chosen(want: &str, offered: &[&str]) -> Option<String> {
        let mut entries: Vec<Descriptor> = offered.iter().map(|p| entry(p)).collect();
        let first = choose(&entries, &wanted(want)).ok().cloned();
        entries.reverse();
        assert_eq!(
            choose(&entries, &wanted(want)).ok().cloned(),
            first,
            "order must not matter here"
        );
        let platform = first?.platform?;
        Some(platform.to_string())
    }

    #[test]
    fn what_there_is_is_listed_to_a_number_and_readable() {
        let mut entries: Vec<Descriptor> = (0..30).map(|i| entry(&format!("linux/cpu{i}"))).collect();
        entries[0].platform.as_mut().unwrap().architecture = "\u{1b}[2J".into();
        let error = choose(&entries, &wanted("amd64")).unwrap_err().to_string();
        assert!(error.contains(r"has linux/\u{1b}[2j, linux/cpu1, "), "{error}");
        assert!(error.contains("linux/cpu19 and 10 more; choose"), "{error}");
    }

    #[test]
    fn platforms_parse_normalised() {
        for (text, normal) in [
            ("linux/amd64", "linux/amd64"),
            ("amd64", "linux/amd64"),
            ("x86_64", "linux/amd64"),
            ("Linux/X86-64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("i386", "linux/386"),
            ("i486", "linux/386"),
            ("i586", "linux/386"),
            ("linux/i686", "linux/386"),
            ("80386", "linux/386"),
            ("aarch64", "linux/arm64"),
            ("linux/arm64/8", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm64/v8.0", "linux/arm64"),
            ("linux/arm64/v8.2", "linux/arm64/v8.2"),
            ("linux/arm64/9", "linux/arm64/v9"),
            ("linux/arm64/9.0", "linux/arm64/v9"),
            ("linux/arm64/v9.0", "linux/arm64/v9"),
            ("armhf", "linux/arm/v7"),
            ("armel", "linux/arm/v6"),
            ("arm", "linux/arm/v7"),
            ("linux/arm/5", "linux/arm/v5"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/arm/7", "linux/arm/v7"),
            ("linux/arm/8", "linux/arm/v8"),
            ("macos/arm64", "darwin/arm64"),
            ("linux/riscv64", "linux/riscv64"),
            ("windows/amd64", "windows/amd64"),
        ] {
            assert_eq!(wanted(text).to_string(), normal, "{text}");
            assert_eq!(wanted(normal).to_string(), normal);
        }
    }

    #[test]
    fn malformed_platforms_are_refused() {
        for text in [
            "",
            "/",
            "linux/",
            "/amd64",
            "linux/amd64/",
            "a/b/c/d",
            "linux amd64",
            "linux/\u{e9}",
            "linux//v8",
        ] {
            assert!(
                matches!(text.parse::<Platform>(), Err(PlatformError::Malformed { .. })),
                "{text}"
            );
        }
    }

    /// For each wanted platform, the test withdraws the best offer again and again.
    #[test]
    fn preference_vectors() {
        let rows: &[(&str, &[&str])] = &[
            ("amd64", &["linux/amd64", "linux/386"]),
            ("linux/amd64/v2", &["linux/amd64/v2", "linux/amd64", "linux/386"]),
            (
                "linux/amd64/v4",
                &[
                    "linux/amd64/v4",
                    "linux/amd64/v3",
                    "linux/amd64/v2",
                    "linux/amd64/v1",
                    "linux/i386",
                ],
            ),
            (
                "arm64",
                &[
                    "linux/arm64/v8",
                    "linux/arm/v8",
                    "linux/arm",
                    "linux/arm/v6",
                    "linux/arm/v5",
                ],
            ),
            (
                "linux/arm64/v8.2",
                &[
                    "linux/arm64/v8.2",
                    "linux/arm64/v8.1",
                    "linux/arm64",
                    "linux/arm/v8",
                    "linux/arm/v7",
                    "linux/arm/v6",
                    "linux/arm/v5",
                ],
            ),
            (
                "linux/arm64/v9.1",
                &[
                    "linux/arm64/v9.1",
                    "linux/arm64/v9.0",
                    "linux/arm64/v8.6",
                    "linux/arm64/v8.5",
                    "linux/arm64/v8.4",
                    "linux/arm64/v8.3",
                    "linux/arm64/v8.2",
                    "linux/arm64/v8.1",
                    "linux/aarch64",
                    "linux/arm/v8",
                    "linux/armhf",
                    "linux/armel",
                    "linux/arm/v5",
                ],
            ),
            (
                "linux/arm64/v9",
                &["linux/arm64/v9", "linux/arm64/v8.5", "linux/arm64/v8"],
            ),
            ("arm", &["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]),
            (
                "linux/arm/v8",
                &["linux/arm/v8", "linux/arm/v7", "linux/arm/v6", "linux/arm/v5"],
            ),
            ("linux/arm/v6", &["linux/arm/v6", "linux/arm/v5"]),
            ("linux/arm/v5", &["linux/arm/v5"]),
            ("s390x", &["linux/s390x"]),
            ("386", &["linux/386"]),
        ];
        // None of the wanted platforms above runs any of these.
        let others = [
            "linux/mips64le",
            "windows/amd64",
            "darwin/arm64",
            "unknown/unknown",
            "freebsd/386",
        ];
        for (want, vector) in rows {
            for start in 0..=vector.len() {
                let mut offered = vector[start..].to_vec();
                offered.extend(others);
                assert_eq!(
                    chosen(want, &offered).as_deref(),
                    vector.get(start).copied(),
                    "{want} of {offered:?}"
                );
            }
        }
    }

    #[test]
    fn what_a_host_cannot_run_is_not_taken() {
        for (want, offered) in [
            ("amd64", "linux/amd64/v2"),
            ("linux/amd64/v2", "linux/amd64/v3"),
            ("linux/arm/v6", "linux/arm/v7"),
            ("linux/arm/v6", "linux/arm"),
            ("linux/arm/v7", "linux/arm64"),
            ("arm64", "linux/arm64/v8.1"),
            ("linux/arm64/v8.9", "linux/arm64/v9"),
            ("linux/arm64/v9", "linux/arm64/v8.6"),
            ("386", "linux/amd64"),
            ("riscv64", "linux/amd64"),
            ("linux/riscv64/rva22", "linux/riscv64/rva23"),
        ] {
            assert_eq!(chosen(want, &[offered]), None, "{want} {offered}");
        }
    }

    #[test]
    fn elsewhere_either_side_may_leave_the_variant_out() {
        assert_eq!(
            chosen("ppc64le", &["linux/ppc64le/power9"]).unwrap(),
            "linux/ppc64le/power9"
        );
        assert_eq!(
            chosen("linux/ppc64le/power9", &["linux/ppc64le"]).unwrap(),
            "linux/ppc64le"
        );
        for known in [
            "amd64/v1",
            "amd64/v4",
            "arm/v7",
            "arm64/v8",
            "arm64/v8.2",
            "arm64/v9.1",
            "riscv64/any",
        ] {
            assert!(format!("linux/{known}").parse::<Platform>().is_ok(), "{known}");
        }
        for unknown in [
            "amd64/odd",
            "amd64/v9",
            "amd64/v1.1",
            "arm/v9",
            "arm64/vfoo",
            "arm64/v10",
        ] {
            let error = format!("linux/{unknown}").parse::<Platform>().unwrap_err();
            assert!(error.to_string().contains("has no variant"), "{error}");
        }
    }

    #[test]
    fn of_equals_the_earliest_wins_and_companions_never() {
        let plain = entry("linux/amd64");
        let mut soci = plain.clone();
        soci.digest = Digest::of(b"soci");
        soci.artifact_type = Some("application/vnd.amazon.soci.index.v2+json".into());
        let mut nydus = plain.clone();
        nydus.digest = Digest::of(b"nydus");
        nydus.platform.as_mut().unwrap().os_features = vec!["nydus.remoteimage.v1".into()];
        let mut attestation = plain.clone();
        attestation.digest = Digest::of(b"attestation");
        let reference_type = (
            "vnd.docker.reference.type".to_owned(),
            "attestation-manifest".to_owned(),
        );
        attestation.annotations.insert(reference_type.0, reference_type.1);
        let mut features = plain.clone();
        features.digest = Digest::of(b"features");
        features.platform.as_mut().unwrap().os_features = vec!["sgx".into()];
        let mut typed = plain.clone();
        typed.digest = Digest::of(b"typed");
        typed.artifact_type = Some(media_type::OCI_CONFIG.into());
        let mut second = plain.clone();
        second.digest = Digest::of(b"second");

        let entries = [
            soci,
            nydus,
            attestation,
            features,
            entry(""),
            typed.clone(),
            plain,
            second,
        ];
        assert_eq!(choose(&entries, &wanted("amd64")).unwrap(), &typed);
        assert_eq!(choose(&entries[6..], &wanted("amd64")).unwrap(), &entries[6]);
        assert!(choose(&entries[..5], &wanted("amd64")).is_err());
    }

    #[test]
    fn the_error_lists_what_there_is() {
        let entries = ["linux/arm64/v8", "linux/s390x", "unknown/unknown", "linux/aarch64"].map(entry);
        assert_eq!(
            choose(&entries, &wanted("amd64")).unwrap_err().to_string(),
            "no image for linux/amd64: the image index has linux/arm64, linux/s390x; choose one with --platform"
        );
        assert_eq!(
            choose(&[], &wanted("amd64")).unwrap_err().to_string(),
            "no image for linux/amd64: the image index lists none for any platform"
        );
    }

    #[test]
    fn the_host_is_linux_on_a_known_processor() {
        let host = Platform::host();
        assert_eq!(host, host.normalized());
        assert_eq!(host.os, "linux");
        assert!(runs(&host, &host));
    }
}
