//! What containerd says about a layer when it asks whether somebody has to fetch it.
//!
//! While containerd unpacks an image, it prepares a snapshot for each layer, the lowest first. The labels of the snapshot
//! name the layer's chain ID, and the image's name and manifest if containerd is configured to tell (CRI does with
//! `disable_snapshot_annotations = false`).

use std::collections::BTreeMap;

use crate::oci::{DiffId, Digest, Reference};

/// The label with the chain ID that the layer completes (containerd's `snapshots.LabelSnapshotRef`).
pub const CHAIN: &str = "containerd.io/snapshot.ref";
/// The label with the image's name.
const REFERENCE: &str = "containerd.io/snapshot/cri.image-ref";
/// The label with the digest of the image's manifest for the platform.
const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";

/// A layer that containerd is about to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerQuestion {
    /// The chain ID that the layer completes.
    pub chain: String,
    /// The image's name, with the manifest's digest as its digest.
    pub reference: Reference,
    /// The digest of the image's manifest.
    pub manifest: Digest,
}

impl LayerQuestion {
    /// Reads the labels of a snapshot. Returns `None` if it is no layer, or if the labels do not say of which image.
    pub fn of(labels: &BTreeMap<String, String>) -> Option<Self> {
        let manifest: Digest = labels.get(MANIFEST)?.parse().ok()?;
        let mut reference: Reference = labels.get(REFERENCE)?.parse().ok()?;
        reference.digest = Some(manifest.clone());
        Some(Self {
            chain: labels.get(CHAIN)?.clone(),
            reference,
            manifest,
        })
    }
}

/// Returns the chain ID of layers with these diffIDs, the lowest first (image-spec config.md, "Layer ChainID").
pub fn chain_id(diff_ids: &[DiffId]) -> Option<String> {
    let (first, rest) = diff_ids.split_first()?;
    let add = |below: String, layer: &DiffId| Digest::of(format!("{below} {layer}").as_bytes()).to_string();
    Some(rest.iter().fold(first.to_string(), add))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_labels_of_cri_name_layer_and_image() {
        let manifest = format!("sha256:{}", "a".repeat(64));
        let other = format!("localhost:5000/app:1@sha256:{}", "b".repeat(64));
        let all = [
            (CHAIN, "sha256:c"),
            (REFERENCE, other.as_str()),
            (MANIFEST, manifest.as_str()),
        ];
        let question = LayerQuestion::of(&labels(&all)).unwrap();
        assert_eq!(question.chain, "sha256:c");
        // The image may have been named by the digest of its index; what counts is the manifest.
        assert_eq!(
            question.reference.to_string(),
            format!("localhost:5000/app:1@{manifest}")
        );
        for missing in 0..all.len() {
            let mut some = all.to_vec();
            some.remove(missing);
            assert_eq!(LayerQuestion::of(&labels(&some)), None);
        }
        for (name, value) in [(REFERENCE, "no NAME"), (MANIFEST, "sha256:0")] {
            let mut wrong = labels(&all);
            wrong.insert(name.to_owned(), value.to_owned());
            assert_eq!(LayerQuestion::of(&wrong), None);
        }
    }

    #[test]
    fn a_chain_id_covers_all_layers_below() {
        let diff_ids: Vec<DiffId> = ["1", "2", "3"]
            .map(|digit| DiffId(format!("sha256:{}", digit.repeat(64)).parse().unwrap()))
            .into();
        assert_eq!(chain_id(&[]), None);
        assert_eq!(chain_id(&diff_ids[..1]).unwrap(), diff_ids[0].to_string());
        // What `printf '%s %s' sha256:11.. sha256:22.. | sha256sum` prints, and again with the third.
        let two = Digest::of(format!("{} {}", diff_ids[0], diff_ids[1]).as_bytes());
        assert_eq!(chain_id(&diff_ids[..2]).unwrap(), two.to_string());
        let three = Digest::of(format!("{two} {}", diff_ids[2]).as_bytes());
        assert_eq!(chain_id(&diff_ids).unwrap(), three.to_string());
    }
}
