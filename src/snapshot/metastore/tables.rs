//! The SQL of each operation. Every function checks everything first and writes afterwards, so that a refusal has written
//! nothing and may share a transaction with others.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::index::{Change, Own, Record};
use super::layers::{LayerChoice, PublishEntry};
use super::{Adopted, Done, MetaError, NewCommit, NewSnapshot, OpError, layer_tables};
use crate::driver::Id;
use crate::snapshot::remote::LABEL_REF;
use crate::snapshot::{
    Info, Key, Kind, LabelUpdate, Labels, SnapshotError, Timestamp, Usage, check_labels, mapping, schema,
};

pub(super) const PENDING: i64 = 0;
pub(super) const READY: i64 = 1;
pub(super) const REMOVING: i64 = 2;

const RECORD: &str =
    "SELECT s.serial, t.slot, s.key, p.key, s.kind, s.created, s.updated, s.labels, s.ref, s.bytes, s.inodes,
    s.layer, s.own FROM snapshot s JOIN storage t ON t.serial = s.serial LEFT JOIN snapshot p ON p.serial = s.parent";

/// What is Ready and nothing of ours: a slot that somebody else has.
const HELD: &str = "SELECT serial, slot, state FROM storage t WHERE state = ?1
    AND NOT EXISTS (SELECT 1 FROM snapshot s WHERE s.serial = t.serial)
    AND NOT EXISTS (SELECT 1 FROM layer l WHERE l.serial = t.serial)";

/// Everything that is recorded, as changes to an empty index.
pub(super) fn load(db: &Connection) -> Result<Vec<Change>, MetaError> {
    let mut changes = Vec::new();
    let mut storage = db.prepare("SELECT serial, slot, state FROM storage WHERE state <> ?1")?;
    let mut rows = storage.query([READY])?;
    while let Some(row) = rows.next()? {
        let id = id_of(row)?;
        let pending = row.get::<_, i64>(2)? == PENDING;
        changes.push(if pending { Change::Pending(id) } else { Change::Discarded(id) });
    }
    // A file of version 1, read beside a daemon of that time, has neither layers nor the columns for them.
    let old = schema::version(db)? < 2;
    if !old {
        changes.extend(layer_tables::load(db)?);
        let mut held = db.prepare(HELD)?;
        let mut rows = held.query([READY])?;
        while let Some(row) = rows.next()? {
            changes.push(Change::Held(id_of(row)?));
        }
    }
    let record = if old { RECORD.replace("s.layer, s.own", "NULL, 1") } else { RECORD.to_owned() };
    let mut snapshots = db.prepare(&record)?;
    let mut rows = snapshots.query([])?;
    while let Some(row) = rows.next()? {
        changes.push(Change::Put(Arc::new(record_of(row)?), None));
    }
    Ok(changes)
}

/// The largest serial ever given.
pub(super) fn last_serial(db: &Connection) -> Result<u64, MetaError> {
    let last: Option<i64> = db
        .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'storage'", [], |row| row.get(0))
        .optional()?;
    Ok(last.map_or(0, unsigned))
}

/// Records these serials, which were never given out, as Pending. AUTOINCREMENT then begins above them.
pub(super) fn claim(db: &Connection, serials: &[u64], slots: &[u32]) -> Result<Done<()>, OpError> {
    let mut insert = db.prepare_cached("INSERT INTO storage (serial, slot, state) VALUES (?1, ?2, ?3)")?;
    let mut changes = Vec::with_capacity(serials.len());
    for (serial, slot) in serials.iter().zip(slots) {
        insert.execute(params![signed(*serial), slot, PENDING])?;
        changes.push(Change::Pending(Id { serial: *serial, slot: *slot }));
    }
    Ok(Done { answer: (), changes })
}

/// Records that exactly these slots are somebody else's.
pub(super) fn hold(db: &Connection, slots: &[u32]) -> Result<Done<()>, OpError> {
    let mut held = db.prepare_cached(HELD)?;
    let before: Vec<Id> = held.query_map([READY], id_of)?.collect::<rusqlite::Result<_>>()?;
    let mut changes = Vec::new();
    for id in before.iter().filter(|id| !slots.contains(&id.slot)) {
        db.prepare_cached("DELETE FROM storage WHERE serial = ?1")?.execute([signed(id.serial)])?;
        changes.push(Change::Gone(*id));
    }
    let mut insert = db.prepare_cached("INSERT INTO storage (slot, state) VALUES (?1, ?2)")?;
    for slot in slots.iter().filter(|slot| !before.iter().any(|id| id.slot == **slot)) {
        let serial = unsigned(insert.insert(params![slot, READY])?);
        changes.push(Change::Held(Id { serial, slot: *slot }));
    }
    Ok(Done { answer: (), changes })
}

/// Pending → somebody else's.
pub(super) fn leave(db: &Connection, id: Id) -> Result<Done<()>, OpError> {
    let mut leave = db.prepare_cached("UPDATE storage SET state = ?2 WHERE serial = ?1 AND state = ?3")?;
    let left = leave.execute(params![signed(id.serial), READY, PENDING])? == 1;
    Ok(Done { answer: (), changes: left.then_some(Change::Held(id)).into_iter().collect() })
}

/// The value of a property, which is recorded now if it was not.
pub(super) fn property(db: &Connection, name: &str, first: &str) -> Result<Done<String>, OpError> {
    if let Some(answer) = find_property(db, name)? {
        return Ok(Done { answer, changes: Vec::new() });
    }
    db.execute("INSERT INTO property (name, value) VALUES (?1, ?2)", [name, first])?;
    Ok(Done { answer: first.to_owned(), changes: Vec::new() })
}

/// The value of a property, if it has one.
pub(super) fn find_property(db: &Connection, name: &str) -> Result<Option<String>, rusqlite::Error> {
    db.query_row("SELECT value FROM property WHERE name = ?1", [name], |row| row.get(0)).optional()
}

/// Records one Pending Id for each slot.
pub(super) fn reserve(db: &Connection, slots: &[u32]) -> Result<Done<Vec<Id>>, OpError> {
    let mut insert = db.prepare_cached("INSERT INTO storage (slot, state) VALUES (?1, ?2)")?;
    let mut ids = Vec::with_capacity(slots.len());
    for slot in slots {
        let serial = unsigned(insert.insert(params![slot, PENDING])?);
        ids.push(Id { serial, slot: *slot });
    }
    let changes = ids.iter().map(|id| Change::Pending(*id)).collect();
    Ok(Done { answer: ids, changes })
}

/// Pending → Ready: the Id becomes an active snapshot or a view.
pub(super) fn create(
    db: &Connection,
    new: &NewSnapshot,
    layer: &LayerChoice,
) -> Result<Done<Arc<Record>>, OpError> {
    let parent = find_parent(db, new.parent.as_ref())?;
    if find(db, &new.key)?.is_some() {
        return Err(SnapshotError::AlreadyExists { key: new.key.clone() }.into());
    }
    insert(db, new, parent, None, layer)
}

/// Pending → Ready: the Id becomes the committed snapshot that answers for `chain` on its parent, unless one does already.
pub(super) fn adopt(
    db: &Connection,
    new: &NewSnapshot,
    chain: &str,
    layer: &LayerChoice,
) -> Result<Done<Adopted>, OpError> {
    let parent = find_parent(db, new.parent.as_ref())?;
    if let Some(holder) = answering(db, chain, parent)? {
        return Ok(Done { answer: Adopted::AlreadyThere(Arc::new(holder)), changes: Vec::new() });
    }
    if find(db, &new.key)?.is_some() {
        return Err(SnapshotError::AlreadyExists { key: new.key.clone() }.into());
    }
    let done = insert(db, new, parent, Some(chain), layer)?;
    Ok(Done { answer: Adopted::Created(done.answer), changes: done.changes })
}

fn insert(
    db: &Connection,
    new: &NewSnapshot,
    parent: Option<i64>,
    chain: Option<&str>,
    choice: &LayerChoice,
) -> Result<Done<Arc<Record>>, OpError> {
    let layer = layer_tables::claim(db, choice, new.now)?;
    let own = if layer.is_some() { Own::Unused } else { Own::Used };
    let serial = signed(new.id.serial);
    let ready = "UPDATE storage SET state = ?2 WHERE serial = ?1 AND state = ?3";
    if db.prepare_cached(ready)?.execute(params![serial, READY, PENDING])? != 1 {
        return Err(MetaError::NotPending { serial: new.id.serial }.into());
    }
    db.prepare_cached(
        "INSERT INTO snapshot (serial, key, parent, kind, created, updated, labels, ref, layer, own)
         VALUES (?1, ?2, ?3, ?4, ?5, ?5, ?6, ?7, ?8, ?9)",
    )?
    .execute(params![
        serial,
        new.key.as_str(),
        parent,
        kind_number(new.kind),
        new.now.0,
        labels_text(&new.labels)?,
        chain,
        layer.as_ref().map(|layer| signed(layer.id.serial)),
        own == Own::Used
    ])?;
    let record = Arc::new(Record {
        id: new.id,
        info: Info {
            name: new.key.clone(),
            parent: new.parent.clone(),
            kind: new.kind,
            created: new.now,
            updated: new.now,
            labels: new.labels.clone(),
        },
        answers_for: chain.map(str::to_owned),
        usage: None,
        layer: layer.as_ref().map(|layer| layer.id.serial),
        own,
    });
    let mut changes: Vec<Change> = layer.map(|layer| Change::Layer(Arc::new(layer))).into_iter().collect();
    changes.push(Change::Put(Arc::clone(&record), None));
    Ok(Done { answer: record, changes })
}

/// Active → committed. The order of the checks is containerd's.
pub(super) fn commit(db: &Connection, commit: &NewCommit) -> Result<Done<Arc<Record>>, OpError> {
    let key = &commit.key;
    if find(db, &commit.name)?.is_some() {
        return Err(SnapshotError::AlreadyExists { key: commit.name.clone() }.into());
    }
    let Some(active) = find(db, key)? else {
        return Err(SnapshotError::NotFound { key: key.clone() }.into());
    };
    if active.info.kind != Kind::Active {
        return Err(SnapshotError::NotActive { key: key.clone() }.into());
    }
    let parent = match (&commit.parent, &active.info.parent) {
        (None, kept) => kept.clone(),
        (Some(asked), Some(has)) if asked != has => {
            return Err(SnapshotError::ParentMismatch { key: key.clone(), parent: has.clone() }.into());
        }
        (Some(asked), _) => Some(asked.clone()),
    };
    let parent_serial = match find_parent(db, parent.as_ref()) {
        // At Commit containerd calls this a failed precondition, at Prepare an invalid argument.
        Err(OpError::Refused(SnapshotError::ParentNotCommitted { parent })) => {
            return Err(SnapshotError::RebaseOntoUncommitted { parent }.into());
        }
        other => other?,
    };
    let chain = match commit.labels.get(LABEL_REF) {
        Some(chain) if answering(db, chain, parent_serial)?.is_none() => Some(chain.clone()),
        _ => None,
    };
    // Without a layer image the directory is all there is.
    let own = if active.layer.is_some() { commit.own } else { Own::Used };
    db.prepare_cached(
        "UPDATE snapshot SET key = ?2, parent = ?3, kind = 3, created = ?4, updated = ?4, labels = ?5, ref = ?6, own = ?7
         WHERE serial = ?1",
    )?
    .execute(params![
        signed(active.id.serial),
        commit.name.as_str(),
        parent_serial,
        commit.now.0,
        labels_text(&commit.labels)?,
        chain,
        own == Own::Used
    ])?;
    let record = Arc::new(Record {
        id: active.id,
        info: Info {
            name: commit.name.clone(),
            parent,
            kind: Kind::Committed,
            created: commit.now,
            updated: commit.now,
            labels: commit.labels.clone(),
        },
        answers_for: chain,
        usage: None,
        layer: active.layer,
        own,
    });
    let mut changes = vec![Change::Put(Arc::clone(&record), Some(key.clone()))];
    if let Some(entry) = &commit.publish {
        let entry = PublishEntry { layer: active.layer, ..entry.clone() };
        changes.extend(layer_tables::enqueue(db, &entry)?.changes);
    }
    Ok(Done { answer: record, changes })
}

/// Ready → Removing.
pub(super) fn remove(db: &Connection, key: &Key) -> Result<Done<()>, OpError> {
    let Some(record) = find(db, key)? else {
        return Err(SnapshotError::NotFound { key: key.clone() }.into());
    };
    let serial = signed(record.id.serial);
    let children = "SELECT 1 FROM snapshot WHERE parent = ?1 LIMIT 1";
    if db.prepare_cached(children)?.exists([serial])? {
        return Err(SnapshotError::HasChildren { key: key.clone() }.into());
    }
    db.prepare_cached("DELETE FROM snapshot WHERE serial = ?1")?.execute([serial])?;
    db.prepare_cached("UPDATE storage SET state = ?2 WHERE serial = ?1")?.execute([serial, REMOVING])?;
    Ok(Done { answer: (), changes: vec![Change::Drop(key.clone())] })
}

/// Changes labels.
pub(super) fn update(
    db: &Connection,
    key: &Key,
    update: &LabelUpdate,
    now: Timestamp,
) -> Result<Done<Arc<Record>>, OpError> {
    let Some(mut record) = find(db, key)? else {
        return Err(SnapshotError::NotFound { key: key.clone() }.into());
    };
    match update {
        LabelUpdate::Replace(labels) => record.info.labels = labels.clone(),
        LabelUpdate::Merge(entries) => {
            for (label, value) in entries {
                match value {
                    Some(value) => record.info.labels.insert(label.clone(), value.clone()),
                    None => record.info.labels.remove(label),
                };
            }
        }
    }
    check_labels(&record.info.labels)?;
    if record.info.kind != Kind::Committed {
        // Its mounts are made of this label: one that cannot be mounted is refused here, not at every Mounts.
        mapping::from_labels(&record.info.labels).map_err(SnapshotError::from)?;
    }
    record.info.updated = now;
    // containerd looks a hit up by its label: without the label it cannot be one.
    record.answers_for = record.answers_for.filter(|chain| record.info.labels.get(LABEL_REF) == Some(chain));
    db.prepare_cached("UPDATE snapshot SET labels = ?2, updated = ?3, ref = ?4 WHERE serial = ?1")?.execute(
        params![signed(record.id.serial), labels_text(&record.info.labels)?, now.0, record.answers_for],
    )?;
    let record = Arc::new(record);
    Ok(Done { answer: Arc::clone(&record), changes: vec![Change::Put(record, None)] })
}

/// Keeps what committed snapshots take. Nothing happens for one that is gone by now.
pub(super) fn measured(db: &Connection, usages: &[(Id, Usage)]) -> Result<Done<()>, OpError> {
    let mut update =
        db.prepare_cached("UPDATE snapshot SET bytes = ?2, inodes = ?3 WHERE serial = ?1 AND kind = 3")?;
    let mut find = db.prepare_cached(&format!("{RECORD} WHERE s.serial = ?1"))?;
    let mut changes = Vec::with_capacity(usages.len());
    for (id, usage) in usages {
        let serial = signed(id.serial);
        if update.execute(params![serial, signed(usage.bytes), signed(usage.inodes)])? == 1 {
            changes.push(Change::Put(Arc::new(find.query_row([serial], record_of)?), None));
        }
    }
    Ok(Done { answer: (), changes })
}

/// Pending → Removing. An Id that is not Pending stays as it is.
pub(super) fn discard(db: &Connection, ids: &[Id]) -> Result<Done<()>, OpError> {
    let mut discard = db.prepare_cached("UPDATE storage SET state = ?2 WHERE serial = ?1 AND state = ?3")?;
    let mut changes = Vec::with_capacity(ids.len());
    for id in ids {
        if discard.execute(params![signed(id.serial), REMOVING, PENDING])? == 1 {
            changes.push(Change::Discarded(*id));
        }
    }
    Ok(Done { answer: (), changes })
}

/// Removing → gone. Only for Ids whose storage is freed.
pub(super) fn forget(db: &Connection, ids: &[Id]) -> Result<Done<()>, OpError> {
    let mut delete = db.prepare_cached("DELETE FROM storage WHERE serial = ?1 AND state <> ?2")?;
    let mut changes = Vec::with_capacity(ids.len());
    for id in ids {
        if delete.execute([signed(id.serial), READY])? == 1 {
            changes.push(Change::Gone(*id));
        }
    }
    Ok(Done { answer: (), changes })
}

/// The snapshot of this key or name.
pub(super) fn find(db: &Connection, key: &Key) -> Result<Option<Record>, OpError> {
    Ok(db
        .prepare_cached(&format!("{RECORD} WHERE s.key = ?1"))?
        .query_row([key.as_str()], record_of)
        .optional()?)
}

fn answering(db: &Connection, chain: &str, parent: Option<i64>) -> Result<Option<Record>, OpError> {
    Ok(db
        .prepare_cached(&format!("{RECORD} WHERE s.ref = ?1 AND ifnull(s.parent, 0) = ifnull(?2, 0)"))?
        .query_row(params![chain, parent], record_of)
        .optional()?)
}

/// The serial of a parent, which must be there and committed (M2).
fn find_parent(db: &Connection, parent: Option<&Key>) -> Result<Option<i64>, OpError> {
    let Some(parent) = parent else { return Ok(None) };
    let found = db
        .prepare_cached("SELECT serial, kind FROM snapshot WHERE key = ?1")?
        .query_row([parent.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    match found {
        None => Err(SnapshotError::ParentNotFound { parent: parent.clone() }.into()),
        Some((serial, 3_i64)) => Ok(Some(serial)),
        Some(_) => Err(SnapshotError::ParentNotCommitted { parent: parent.clone() }.into()),
    }
}

fn id_of(row: &Row<'_>) -> rusqlite::Result<Id> {
    Ok(Id { serial: unsigned(row.get(0)?), slot: row.get(1)? })
}

fn record_of(row: &Row<'_>) -> rusqlite::Result<Record> {
    let key = |at: usize, text: String| Key::new(&text).map_err(|e| damaged(at, e));
    let bytes: Option<i64> = row.get(9)?;
    let inodes: Option<i64> = row.get(10)?;
    let labels: String = row.get(7)?;
    Ok(Record {
        id: id_of(row)?,
        info: Info {
            name: key(2, row.get(2)?)?,
            parent: row.get::<_, Option<String>>(3)?.map(|text| key(3, text)).transpose()?,
            kind: match row.get(4)? {
                1 => Kind::View,
                2 => Kind::Active,
                3 => Kind::Committed,
                other => return Err(rusqlite::Error::IntegralValueOutOfRange(4, other)),
            },
            created: Timestamp(row.get(5)?),
            updated: Timestamp(row.get(6)?),
            labels: serde_json::from_str(&labels).map_err(|e| damaged(7, e))?,
        },
        answers_for: row.get(8)?,
        usage: bytes
            .zip(inodes)
            .map(|(bytes, inodes)| Usage { bytes: unsigned(bytes), inodes: unsigned(inodes) }),
        layer: row.get::<_, Option<i64>>(11)?.map(unsigned),
        own: if row.get(12)? { Own::Used } else { Own::Unused },
    })
}

/// Why a column cannot be read.
pub(super) fn damaged(
    column: usize,
    error: impl std::error::Error + Send + Sync + 'static,
) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, Box::new(error))
}

fn labels_text(labels: &Labels) -> Result<String, OpError> {
    serde_json::to_string(labels)
        .map_err(|error| OpError::Failed(rusqlite::Error::ToSqlConversionFailure(error.into())))
}

fn kind_number(kind: Kind) -> i64 {
    match kind {
        Kind::View => 1,
        Kind::Active => 2,
        Kind::Committed => 3,
    }
}

/// SQLite's integers are signed; serials and sizes stay far below 2^63.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
