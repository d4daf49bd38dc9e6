//! The table of snapshots: in memory for questions, in a transactional file for the next start.
//!
//! Invariants:
//! - A change is in the file before it is in memory, so an answer that was given survives the death of the process.
//! - A parent exists, and is committed, as long as it has children.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use redb::{Database, ReadableTable as _, TableDefinition, TableError};

use super::error::SnapshotError;
use super::record::{SnapshotKind, SnapshotRecord};

/// The snapshots, as JSON, by name.
const SNAPSHOTS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("snapshots");
/// Numbers that outlive the process, by name.
const COUNTERS: TableDefinition<'static, &str, u64> = TableDefinition::new("counters");
/// The number of the next directory in [`COUNTERS`].
const NEXT_ID: &str = "next-id";
/// Memory for pages of the file. All snapshots are in memory anyway, so a larger cache gains nothing; a smaller one makes
/// changes read more.
const PAGES: usize = 1 << 20;

/// All snapshots of a root.
#[derive(Debug)]
pub struct SnapshotTable {
    path: PathBuf,
    file: Database,
    snapshots: BTreeMap<String, SnapshotRecord>,
    next_id: u64,
}

impl SnapshotTable {
    /// Opens the table in this file, or makes an empty one. Fails if another process has it open.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let failed = |source: redb::Error| failed(path, source);
        let file = Database::builder()
            .set_cache_size(PAGES)
            .create(path)
            .map_err(|e| failed(e.into()))?;
        let mut table = Self {
            path: path.to_owned(),
            file,
            snapshots: BTreeMap::new(),
            next_id: 1,
        };
        let reading = table.file.begin_read().map_err(|e| failed(e.into()))?;
        match reading.open_table(COUNTERS) {
            Ok(counters) => {
                let next = counters.get(NEXT_ID).map_err(|e| failed(e.into()))?;
                table.next_id = next.map_or(1, |next| next.value());
            }
            Err(TableError::TableDoesNotExist(_)) => return Ok(table),
            Err(error) => return Err(failed(error.into())),
        }
        let stored = reading.open_table(SNAPSHOTS).map_err(|e| failed(e.into()))?;
        for line in stored.iter().map_err(|e| failed(e.into()))? {
            let (name, json) = line.map_err(|e| failed(e.into()))?;
            let record: SnapshotRecord =
                serde_json::from_slice(json.value()).map_err(|error| SnapshotError::Record {
                    path: path.to_owned(),
                    name: name.value().to_owned(),
                    reason: error.to_string(),
                })?;
            table.snapshots.insert(record.name.clone(), record);
        }
        Ok(table)
    }

    /// Returns the snapshot of this name.
    pub fn get(&self, name: &str) -> Result<&SnapshotRecord, SnapshotError> {
        self.snapshots.get(name).ok_or_else(|| SnapshotError::not_found(name))
    }

    /// Returns all snapshots in the order of their names.
    pub fn all(&self) -> impl Iterator<Item = &SnapshotRecord> {
        self.snapshots.values()
    }

    /// Returns a snapshot and those below it, the topmost first.
    pub fn chain(&self, name: &str) -> Result<Vec<&SnapshotRecord>, SnapshotError> {
        let mut chain = vec![self.get(name)?];
        while let Some(parent) = chain.last().and_then(|last| last.parent.as_deref()) {
            chain.push(self.get(parent)?);
        }
        Ok(chain)
    }

    /// Returns a number that no snapshot has had.
    pub fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Adds a snapshot. Its parent must be there and committed.
    pub fn insert(&mut self, record: SnapshotRecord) -> Result<(), SnapshotError> {
        self.check_free(&record.name)?;
        if let Some(parent) = &record.parent {
            self.check_parent(parent)?;
        }
        self.write(None, record)
    }

    /// Puts a snapshot in the place of the snapshot `name`, which may be its own name.
    pub fn replace(&mut self, name: &str, record: SnapshotRecord) -> Result<(), SnapshotError> {
        self.get(name)?;
        if record.name != name {
            self.check_free(&record.name)?;
        }
        self.write(Some(name), record)
    }

    /// Takes a snapshot out, which must have no children.
    pub fn remove(&mut self, name: &str) -> Result<SnapshotRecord, SnapshotError> {
        self.get(name)?;
        if self.all().any(|other| other.parent.as_deref() == Some(name)) {
            return Err(SnapshotError::State {
                name: name.to_owned(),
                reason: "cannot be removed: other snapshots are made on it",
            });
        }
        self.commit(|snapshots| snapshots.remove(name).map(drop))?;
        Ok(self.snapshots.remove(name).expect("it was there"))
    }

    fn check_free(&self, name: &str) -> Result<(), SnapshotError> {
        match self.snapshots.contains_key(name) {
            true => Err(SnapshotError::Exists { name: name.to_owned() }),
            false => Ok(()),
        }
    }

    /// Fails if no snapshot can be made on this one.
    pub fn check_parent(&self, name: &str) -> Result<(), SnapshotError> {
        match self.get(name)?.kind {
            SnapshotKind::Committed => Ok(()),
            SnapshotKind::View | SnapshotKind::Active => Err(SnapshotError::Argument(format!(
                "snapshot {name:?} is not committed, so no snapshot can be made on it"
            ))),
        }
    }

    fn write(&mut self, old: Option<&str>, record: SnapshotRecord) -> Result<(), SnapshotError> {
        let json = serde_json::to_vec(&record).map_err(|error| SnapshotError::Record {
            path: self.path.clone(),
            name: record.name.clone(),
            reason: error.to_string(),
        })?;
        self.commit(|snapshots| {
            if let Some(old) = old {
                snapshots.remove(old)?;
            }
            snapshots.insert(record.name.as_str(), json.as_slice()).map(drop)
        })?;
        if let Some(old) = old {
            self.snapshots.remove(old);
        }
        self.snapshots.insert(record.name.clone(), record);
        Ok(())
    }

    /// Changes the file in one step.
    fn commit(
        &self,
        change: impl FnOnce(&mut redb::Table<'_, &'static str, &'static [u8]>) -> Result<(), redb::StorageError>,
    ) -> Result<(), SnapshotError> {
        let failed = |source: redb::Error| failed(&self.path, source);
        let writing = self.file.begin_write().map_err(|e| failed(e.into()))?;
        {
            let mut snapshots = writing.open_table(SNAPSHOTS).map_err(|e| failed(e.into()))?;
            change(&mut snapshots).map_err(|e| failed(e.into()))?;
            let mut counters = writing.open_table(COUNTERS).map_err(|e| failed(e.into()))?;
            counters.insert(NEXT_ID, self.next_id).map_err(|e| failed(e.into()))?;
        }
        writing.commit().map_err(|e| failed(e.into()))
    }
}

fn failed(path: &Path, source: redb::Error) -> SnapshotError {
    SnapshotError::Table {
        path: path.to_owned(),
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::super::record::SnapshotContent;
    use super::*;

    fn record(name: &str, parent: Option<&str>, kind: SnapshotKind, id: u64) -> SnapshotRecord {
        SnapshotRecord {
            name: name.to_owned(),
            parent: parent.map(str::to_owned),
            kind,
            id,
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            labels: [("a".to_owned(), "b".to_owned())].into(),
            content: SnapshotContent::Changes(None),
        }
    }

    #[test]
    fn a_table_is_the_same_after_it_was_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let mut table = SnapshotTable::open(&path).unwrap();
        let base = record("base", None, SnapshotKind::Committed, table.next_id());
        let top = record("top", Some("base"), SnapshotKind::Active, table.next_id());
        table.insert(base.clone()).unwrap();
        table.insert(top.clone()).unwrap();
        assert!(SnapshotTable::open(&path).is_err(), "two processes have one table");
        drop(table);
        let mut table = SnapshotTable::open(&path).unwrap();
        assert_eq!(table.all().collect::<Vec<_>>(), [&base, &top]);
        assert_eq!(table.chain("top").unwrap(), [&top, &base]);
        assert_eq!(table.next_id(), 3);
        let committed = record("done", Some("base"), SnapshotKind::Committed, top.id);
        table.replace("top", committed.clone()).unwrap();
        table.insert(record("none", None, SnapshotKind::View, 9)).unwrap();
        table.remove("none").unwrap();
        drop(table);
        let table = SnapshotTable::open(&path).unwrap();
        assert_eq!(table.all().collect::<Vec<_>>(), [&base, &committed]);
    }

    #[test]
    fn what_would_break_a_chain_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = SnapshotTable::open(&dir.path().join("table")).unwrap();
        table.insert(record("base", None, SnapshotKind::Committed, 1)).unwrap();
        table
            .insert(record("top", Some("base"), SnapshotKind::Active, 2))
            .unwrap();
        let again = table.insert(record("top", None, SnapshotKind::View, 3));
        assert!(matches!(again, Err(SnapshotError::Exists { .. })));
        let orphan = table.insert(record("x", Some("nobody"), SnapshotKind::Active, 3));
        assert!(matches!(orphan, Err(SnapshotError::NotFound { .. })));
        let on_active = table.insert(record("x", Some("top"), SnapshotKind::Active, 3));
        assert!(matches!(on_active, Err(SnapshotError::Argument(_))));
        assert!(matches!(table.remove("base"), Err(SnapshotError::State { .. })));
        assert!(matches!(table.remove("x"), Err(SnapshotError::NotFound { .. })));
        let taken = table.replace("top", record("base", None, SnapshotKind::Committed, 2));
        assert!(matches!(taken, Err(SnapshotError::Exists { .. })));
        table.remove("top").unwrap();
        table.remove("base").unwrap();
        assert_eq!(table.all().count(), 0);
    }
}
