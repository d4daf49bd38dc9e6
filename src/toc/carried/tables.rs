//! What the table that a layer carries says, in the form that a reader needs.

use crate::memory::Charge;
use crate::toc::{ChunkTable, Tables};

/// What a reader needs to know of a layer, from the table that the layer carries.
#[derive(Debug)]
pub struct CarriedTables {
    /// The same tables that a pass over the layer makes. The extents say where content is in the data device. Offsets in
    /// the tar are not known; the device's offsets are in their place.
    pub tables: Tables,
    /// Where the content is in the blob.
    pub chunks: ChunkTable,
    /// Memory of the chunks.
    pub charge: Charge,
}
