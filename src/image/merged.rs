//! The tree that is merged from the tables of an image's layers.

use std::collections::HashMap;
use std::sync::Arc;

use super::ImageError;
use super::prefetch::Layers;
use crate::layer::{self, OpenError};
use crate::memory::{Allowance, Charge};
use crate::oci::Digest;
use crate::store::Authority;
use crate::toc::PackedToc;
use crate::toc::carried::ADDED;
use crate::tree::{LayerIdx, Merger, Tree, TreeError};

/// Tables of contents that the store does not have, with their memory charges.
pub(super) type Tocs = HashMap<Digest, Option<(PackedToc, Charge)>>;

/// Merges the layers' tables, base first. Only one table is in memory at a time if the store has them. `added` says of each
/// layer whether its writer has added files that are no part of the image.
pub(super) fn merge(layers: &Layers, added: &[bool], tocs: &Tocs, tables: &Arc<Allowance>) -> Result<Tree, ImageError> {
    let mut merger = Merger::charged(tables.charge())?;
    for (position, layer) in layers.all.iter().enumerate() {
        let digest = layer.digest();
        let hidden: &[&[u8]] = if added[position] { &ADDED } else { &[] };
        let position = LayerIdx(position as u32);
        let merged = match &tocs[digest] {
            Some((toc, _)) => merger.add_without(position, toc, hidden),
            None => {
                let toc = layer::stored_toc(digest, layer.home())?;
                let mut charge = tables.charge();
                charge.exactly(toc.bytes() as u64)?;
                merger.add_without(position, &toc, hidden)
            }
        };
        merged.map_err(|error| match error {
            TreeError::Toc { source, .. } => ImageError::Layer(OpenError::Toc {
                layer: digest.clone(),
                reason: source.to_string(),
            }),
            error => ImageError::Merge(error),
        })?;
    }
    Ok(merger.finish())
}

/// Leaves the tables that the store does not have with their layers, which compare them with a pass if bytes are not what
/// the table says. A layer that a pass opened needs none.
pub(super) fn hold(layers: &Layers, mut tocs: Tocs) {
    for layer in layers.all.iter().filter(|layer| *layer.authority() != Authority::Pass) {
        if let Some(toc) = tocs.remove(layer.digest()).flatten() {
            layer.hold_toc(toc);
        }
    }
}
