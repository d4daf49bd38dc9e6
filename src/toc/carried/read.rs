//! Checks and unpacks a table, and has the tables of a layer made from it.

use std::io::{self, Read};

use super::annotations::{Dialect, MAX_JSON};
use super::assembly::Assembly;
use super::{CarriedError, CarriedTables, TableRef, json};
use crate::memory::Charge;
use crate::oci::Digest;
use crate::toc::header::{NumericField, TarBlock, TarHeader};
use crate::toc::{BLOCK, ChunkCodec, Limits};

/// Name of the file that is the table of an eStargz layer.
const FILE: &[u8] = b"stargz.index.json";
/// Largest window of a table's zstd frame, as a binary logarithm: 32 MiB, the most that usual encoders write.
const WINDOW_LOG_MAX: u32 = 25;
/// Bytes that are hashed at once.
const BUFFER: usize = 32 << 10;

impl TableRef {
    /// Reads the table from its `bytes`, which are those of `place` in the blob (see [`TableRef::table_range`]).
    pub fn read(&self, place: std::ops::Range<u64>, bytes: &[u8]) -> Result<CarriedTables, CarriedError> {
        self.read_charged(place, bytes, [Charge::default(), Charge::default()])
    }

    /// Reads the table. Charges the tables to the first charge, and the chunks to the second one.
    pub(crate) fn read_charged(
        &self,
        place: std::ops::Range<u64>,
        bytes: &[u8],
        [tables, chunks]: [Charge; 2],
    ) -> Result<CarriedTables, CarriedError> {
        self.check(bytes)?;
        let mut assembly = Assembly::new(self.dialect, self.data_end(&place), Limits::default(), tables, chunks);
        json::read(self.unpack(bytes)?.take(MAX_JSON), |entry| assembly.entry(entry))?;
        assembly.finish(self)
    }

    /// Checks the bytes of the table against all digests that the descriptor has.
    fn check(&self, bytes: &[u8]) -> Result<(), CarriedError> {
        let packed = match self.dialect {
            Dialect::Containers => Some(&self.digest),
            Dialect::Stargz => self.packed.as_ref(),
        };
        if let Some(expected) = packed {
            expected.verify(bytes).map_err(differs(expected))?;
        }
        if self.dialect == Dialect::Containers {
            return Ok(());
        }
        let mut hasher = self.digest.hasher();
        let mut json = self.unpack(bytes)?;
        let mut buffer = vec![0; BUFFER];
        let mut total = 0;
        loop {
            let len = match json.read(&mut buffer).map_err(malformed)? {
                0 => break,
                len => len,
            };
            hasher.update(&buffer[..len]);
            total += len as u64;
            if total > MAX_JSON {
                return Err(CarriedError::Unusable {
                    reason: "it is too large",
                });
            }
        }
        hasher.verify(&self.digest).map_err(differs(&self.digest))
    }

    /// Returns the JSON of a table.
    fn unpack<'a>(&self, bytes: &'a [u8]) -> Result<Box<dyn Read + 'a>, CarriedError> {
        match self.codec {
            ChunkCodec::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(malformed)?;
                decoder.window_log_max(WINDOW_LOG_MAX).map_err(malformed)?;
                Ok(Box::new(decoder))
            }
            ChunkCodec::Gzip => {
                let mut decoder = flate2::read::MultiGzDecoder::new(bytes);
                let mut block: TarBlock = [0; BLOCK];
                decoder.read_exact(&mut block).map_err(malformed)?;
                let header = TarHeader::new(&block).filter(|header| header.name() == FILE);
                let size = header.and_then(|header| header.number(NumericField::SIZE));
                let size = size.and_then(|size| u64::try_from(size).ok());
                let size = size.ok_or_else(|| CarriedError::Malformed {
                    reason: "it is no tar of one file with the right name".to_owned(),
                })?;
                Ok(Box::new(decoder.take(size)))
            }
        }
    }
}

fn differs(expected: &Digest) -> impl Fn(Digest) -> CarriedError {
    |actual| CarriedError::Digest {
        expected: expected.clone(),
        actual,
    }
}

fn malformed(error: io::Error) -> CarriedError {
    CarriedError::Malformed {
        reason: error.to_string(),
    }
}
