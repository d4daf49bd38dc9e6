//! Selects the entry of a layout's `index.json` that a name means.

use std::path::Path;

use crate::blob::BlobError;
use crate::oci::{Descriptor, Digest, Reference, is_companion, listing, shown};

/// Annotation with the name within the layout: a tag, or any other text.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation with the full reference, written by containerd and BuildKit.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Picks the entry called `image`, or the only one.
pub(super) fn select<'a>(
    entries: &'a [Descriptor],
    image: Option<&str>,
    dir: &Path,
) -> Result<&'a Descriptor, BlobError> {
    let not_found = |what: String| BlobError::NotFound {
        what,
        hint: Some(names(entries)),
    };
    let Some(image) = image else {
        let mut images = entries.iter().filter(|entry| !is_companion(entry));
        return match (images.next(), images.next()) {
            (Some(only), None) => Ok(only),
            (Some(_), Some(_)) => Err(not_found(format!(
                "the only image in {} (it has several)",
                dir.display()
            ))),
            (None, _) => Err(not_found(format!("an image in {}", dir.display()))),
        };
    };
    named(entries, image, dir)
        .or_else(|| at_position(entries, image))
        .or_else(|| with_digest(entries, image))
        .ok_or_else(|| not_found(format!("image `{image}` in {}", dir.display())))
}

fn named<'a>(entries: &'a [Descriptor], image: &str, dir: &Path) -> Option<&'a Descriptor> {
    let complete = image.parse::<Reference>().map(|reference| reference.to_string()).ok();
    let has = |entry: &&Descriptor, annotation: &str, name: &str| {
        entry.annotations.get(annotation).is_some_and(|value| value == name)
    };
    let ways = [
        (REF_NAME, Some(image)),
        (CONTAINERD_NAME, Some(image)),
        (CONTAINERD_NAME, complete.as_deref()),
    ];
    for (annotation, name) in ways {
        let Some(name) = name else { continue };
        let mut found = entries.iter().filter(|entry| has(entry, annotation, name));
        if let Some(last) = found.next_back() {
            if let Some(earlier) = found.next_back() {
                tracing::warn!(
                    layout = %dir.display(), image, taken = %last.digest, passed_over = %earlier.digest,
                    "several images have this name: the last one is taken"
                );
            }
            return Some(last);
        }
    }
    None
}

fn at_position<'a>(entries: &'a [Descriptor], image: &str) -> Option<&'a Descriptor> {
    entries.get(image.strip_prefix('@')?.parse::<usize>().ok()?)
}

fn with_digest<'a>(entries: &'a [Descriptor], image: &str) -> Option<&'a Descriptor> {
    let digest: Digest = image.parse().ok()?;
    entries.iter().find(|entry| entry.digest == digest)
}

/// Lists the images, as a person would ask for them.
fn names(entries: &[Descriptor]) -> String {
    let images = entries.iter().enumerate().filter(|(_, entry)| !is_companion(entry));
    let mut names = Vec::new();
    for (position, entry) in images {
        let name = [REF_NAME, CONTAINERD_NAME]
            .iter()
            .find_map(|key| entry.annotations.get(*key));
        let platform = entry.platform.as_ref().map(|p| format!(" ({p})")).unwrap_or_default();
        let name = name.map_or_else(|| format!("@{position}{platform}"), |name| format!("`{}`", shown(name)));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    listing(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::ImageIndex;

    fn entries(annotations: &[&str]) -> Vec<Descriptor> {
        let entry = |(i, annotations): (usize, &&str)| {
            let digest = Digest::of(&[u8::try_from(i).unwrap()]);
            format!(r#"{{"digest":"{digest}","annotations":{{{annotations}}}}}"#)
        };
        let entries: Vec<String> = annotations.iter().enumerate().map(entry).collect();
        let index = format!(r#"{{"manifests":[{}]}}"#, entries.join(","));
        ImageIndex::parse(index.as_bytes()).unwrap().manifests
    }

    fn position(annotations: &[&str], image: Option<&str>) -> Result<usize, String> {
        let entries = entries(annotations);
        let found = select(&entries, image, Path::new("dir")).map_err(|error| error.to_string())?;
        Ok(entries.iter().position(|entry| entry.digest == found.digest).unwrap())
    }

    const V1: &str = r#""org.opencontainers.image.ref.name":"v1""#;
    const V2: &str = r#""org.opencontainers.image.ref.name":"v2""#;
    const FULL: &str = r#""io.containerd.image.name":"docker.io/library/app:v1""#;
    const ATTESTATION: &str = r#""vnd.docker.reference.type":"attestation-manifest""#;

    #[test]
    fn names_positions_and_digests_select() {
        let all = [V1, V2, FULL, ATTESTATION, ""];
        let second = Digest::of(&[1]).to_string();
        for (image, want) in [
            ("v1", 0),
            ("v2", 1),
            ("docker.io/library/app:v1", 2),
            ("app:v1", 2),
            ("@0", 0),
            ("@4", 4),
            (second.as_str(), 1),
        ] {
            assert_eq!(position(&all, Some(image)), Ok(want), "{image}");
        }
        // The name within the layout goes before the full name. Of entries with the same name, the last one counts.
        let full_as_name = r#""org.opencontainers.image.ref.name":"docker.io/library/app:v1""#;
        assert_eq!(position(&[full_as_name, FULL], Some("docker.io/library/app:v1")), Ok(0));
        assert_eq!(position(&[V1, V2, V1], Some("v1")), Ok(2));
        // A name that looks like a position is first taken for a name.
        assert_eq!(
            position(&["", r#""org.opencontainers.image.ref.name":"@0""#], Some("@0")),
            Ok(1)
        );
    }

    #[test]
    fn without_a_name_there_must_be_one_image() {
        assert_eq!(position(&[""], None), Ok(0));
        assert_eq!(position(&[ATTESTATION, V1], None), Ok(1));
        assert_eq!(
            position(&[V1, FULL, ""], None),
            Err("the only image in dir (it has several) not found: it has `v1`, `docker.io/library/app:v1`, @2".into())
        );
        assert_eq!(
            position(&[ATTESTATION], None),
            Err("an image in dir not found: it has none".into())
        );
    }

    #[test]
    fn names_are_listed_readably() {
        let name = format!(
            r#""org.opencontainers.image.ref.name":"v1\u001b{}""#,
            "x".repeat(100_000)
        );
        let error = position(&[&name], Some("v2")).unwrap_err();
        assert!(error.contains(r"it has `v1\u{1b}xxx") && error.len() < 2000, "{error}");
    }

    #[test]
    fn a_name_nobody_has_lists_those_there_are() {
        for image in ["v3", "@9", "@-1", "@", "", "sha256:00", "../x", "app"] {
            let error = position(&[V1, FULL, V1], Some(image)).unwrap_err();
            let want = format!("image `{image}` in dir not found: it has `v1`, `docker.io/library/app:v1`");
            assert_eq!(error, want);
        }
        assert!(position(&[""; 30], Some("x")).unwrap_err().ends_with("@19 and 10 more"));
    }
}
