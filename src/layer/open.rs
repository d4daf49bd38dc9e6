//! Opens a layer. An index in the store comes first. Without one, a layer may carry a table for which the manifest vouches, or
//! somebody else has made an index. Any other layer is streamed once.
//!
//! An index of somebody else may be slow to come. Then the layer is streamed beside the question, and whichever is there
//! first is used.
//!
//! A pass over the whole layer on this host outranks all other authorities: an index that a pass has made is used before
//! any other.

use super::carried;
use super::data::LayerContext;
use super::opening::{OpenError, Opened, ToOpen};
use super::published::open_found;
use super::stored::{LayerIndex, from_store};
use super::streamed::stream;
use super::turn::Turn;
use super::{IndexSource, Layer};
use crate::store::Authority;

/// Opens a layer. One process at a time streams it; other processes wait for the index that this process makes.
pub(crate) async fn open(context: &LayerContext, wanted: ToOpen) -> Result<Opened, OpenError> {
    let stats = wanted.stats.clone();
    stats.opening(open_or_stream(context, wanted)).await
}

async fn open_or_stream(context: &LayerContext, wanted: ToOpen) -> Result<Opened, OpenError> {
    let ToOpen {
        blob, diff_id, stats, ..
    } = &wanted;
    let known = |authority: &Authority| LayerIndex::new(&context.store, blob.digest(), authority.clone());
    for known in wanted.authorities.iter().map(known) {
        if let Some(data) = context.shared.get(&known.name)
            && data.diff_id == *diff_id
        {
            stats.set_source(IndexSource::Store);
            return Ok(Opened {
                layer: Layer::new(data, blob.clone(), stats.clone()),
                toc: None,
            });
        }
        // The index of a table that the layer carries is of another kind.
        if let Authority::Manifest { .. } = known.authority {
            if let Some(opened) = carried::open(context, &wanted, &known).await? {
                return Ok(opened);
            }
        } else if let Some(opened) = from_store(context, &known, blob, diff_id, stats).await? {
            return Ok(opened);
        }
    }
    let mut indexes = wanted.lookups.index(blob.digest());
    let bandwidth = || blob.link().bandwidth;
    let mut patience = std::pin::pin!(indexes.patience(bandwidth));
    loop {
        let next = async {
            tokio::select! {
                biased;
                found = indexes.next() => found,
                () = &mut patience => None,
            }
        };
        let Some(found) = stats.waiting(next).await else { break };
        if let Some(opened) = open_found(context, &wanted, found).await? {
            return Ok(opened);
        }
    }
    // Whichever is there first is used: the pass, or an index that is still on its way.
    let mut streaming = std::pin::pin!(stream_in_turn(context, &wanted));
    loop {
        tokio::select! {
            biased;
            opened = &mut streaming => {
                indexes.give_up(bandwidth());
                return opened;
            }
            Some(found) = indexes.next() => {
                if let Some(opened) = open_found(context, &wanted, found).await? {
                    return Ok(opened);
                }
            }
        }
    }
}

/// Streams a layer when no other process streams it, or opens it with the index that another process has made.
async fn stream_in_turn(context: &LayerContext, wanted: &ToOpen) -> Result<Opened, OpenError> {
    let ToOpen {
        blob, diff_id, stats, ..
    } = wanted;
    let pass = LayerIndex::new(&context.store, blob.digest(), Authority::Pass);
    let (dir, turn) = match pass.dir.clone().filter(|_| context.store.is_writable()) {
        None => (None, None),
        Some(dir) => match Turn::wait(&dir, stats).await {
            Ok(turn) => (Some(dir), turn),
            Err(error) => {
                context.health.store_lost(&error);
                (None, None)
            }
        },
    };
    if let Some(opened) = from_store(context, &pass, blob, diff_id, stats).await? {
        return Ok(opened);
    }
    let streaming = stream(context, wanted.clone(), dir);
    match turn {
        Some(turn) => turn.take(stats, || blob.link().useful_rate(), streaming).await,
        None => streaming.await,
    }
}
