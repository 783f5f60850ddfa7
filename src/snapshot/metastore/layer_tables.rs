//! The SQL of layer images and of the publish queue. As in `tables`: everything is checked before anything is written.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::index::{Change, Record};
use super::layers::{LayerChoice, LayerRecord, NewLayer, Origin, Progress, PublishEntry};
use super::tables::{self, PENDING, READY, REMOVING, signed, unsigned};
use super::{Done, MetaError, OpError};
use crate::driver::Id;
use crate::image::{Facts, Layout, RESERVED};
use crate::oci::{ChainId, DiffId, Digest};
use crate::snapshot::{Key, Kind, SnapshotError, Timestamp};

const LAYER: &str = "SELECT l.serial, t.slot, l.diff_id, l.attributes, l.origin, l.complete, l.blob, l.store_index,
    l.published, l.tar_size, l.image_size, l.metadata_offset, l.metadata_length, l.inodes, l.data_bytes, l.root_uid,
    l.root_gid, l.used, l.fetched, l.shared FROM layer l JOIN storage t ON t.serial = l.serial";

/// Everything that is recorded, as changes to an empty index.
pub(super) fn load(db: &Connection) -> Result<Vec<Change>, MetaError> {
    let mut changes = Vec::new();
    let mut layers = db.prepare(LAYER)?;
    let mut rows = layers.query([])?;
    while let Some(row) = rows.next()? {
        changes.push(Change::Layer(Arc::new(layer_of(row)?)));
    }
    let mut queue = db.prepare(ENTRY)?;
    let mut rows = queue.query([])?;
    while let Some(row) = rows.next()? {
        changes.push(Change::Queued(entry_of(row)?));
    }
    Ok(changes)
}

/// The layer image of this serial.
pub(super) fn find(db: &Connection, serial: u64) -> Result<Option<LayerRecord>, OpError> {
    Ok(db
        .prepare_cached(&format!("{LAYER} WHERE l.serial = ?1"))?
        .query_row([signed(serial)], layer_of)
        .optional()?)
}

fn find_same(db: &Connection, facts: &Facts, origin: Origin) -> Result<Option<LayerRecord>, OpError> {
    Ok(db
        .prepare_cached(&format!("{LAYER} WHERE l.diff_id = ?1 AND l.attributes = ?2 AND l.origin = ?3"))?
        .query_row(params![facts.diff_id.0.as_str(), attributes_text(facts), origin_number(origin)], layer_of)
        .optional()?)
}

/// Makes sure that the chosen layer image is recorded, and as just used. `None` for a snapshot without one.
pub(super) fn claim(
    db: &Connection,
    choice: &LayerChoice,
    now: Timestamp,
) -> Result<Option<LayerRecord>, OpError> {
    let known = match choice {
        LayerChoice::Own => return Ok(None),
        LayerChoice::Known(id) => match find(db, id.serial)? {
            Some(layer) => layer,
            // Evicted between the choice and this transaction.
            None => return Err(SnapshotError::LayerGone { serial: id.serial }.into()),
        },
        LayerChoice::New(new) => match find_same(db, &new.facts, new.origin)? {
            // Recorded meanwhile, from another publisher: not what was checked.
            Some(layer) if layer.origin == Origin::Fetched && layer.index != new.index => {
                return Err(SnapshotError::LayerGone { serial: new.id.serial }.into());
            }
            Some(layer) => layer,
            None => return insert(db, new).map(Some),
        },
    };
    let layer = LayerRecord { used: now, ..known };
    write(db, &layer)?;
    Ok(Some(layer))
}

fn insert(db: &Connection, new: &NewLayer) -> Result<LayerRecord, OpError> {
    let serial = signed(new.id.serial);
    let ready = "UPDATE storage SET state = ?2 WHERE serial = ?1 AND state = ?3";
    if db.prepare_cached(ready)?.execute(params![serial, READY, PENDING])? != 1 {
        return Err(MetaError::NotPending { serial: new.id.serial }.into());
    }
    let layer = LayerRecord {
        id: new.id,
        facts: new.facts.clone(),
        origin: new.origin,
        progress: new.progress,
        blob: new.blob.clone(),
        index: new.index,
        published: None,
        used: new.now,
        fetched: 0,
        shared: 0,
    };
    write(db, &layer)?;
    Ok(layer)
}

/// Writes the record as it is now.
pub(super) fn write(db: &Connection, layer: &LayerRecord) -> Result<(), OpError> {
    let facts = &layer.facts;
    db.prepare_cached(
        "INSERT INTO layer (serial, diff_id, attributes, origin, complete, blob, store_index, published, tar_size,
            image_size, metadata_offset, metadata_length, inodes, data_bytes, root_uid, root_gid, used, fetched, shared)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19)
         ON CONFLICT (serial) DO UPDATE SET complete = excluded.complete, blob = excluded.blob,
            store_index = excluded.store_index, published = excluded.published, used = excluded.used,
            fetched = excluded.fetched, shared = excluded.shared",
    )?
    .execute(params![
        signed(layer.id.serial),
        facts.diff_id.0.as_str(),
        attributes_text(facts),
        origin_number(layer.origin),
        layer.progress == Progress::Complete,
        layer.blob.as_ref().map(Digest::as_str),
        layer.index.map(hex),
        layer.published.map(|at| at.0),
        signed(facts.tar_size),
        signed(facts.layout.size),
        signed(facts.layout.metadata.start),
        signed(facts.layout.metadata.end - facts.layout.metadata.start),
        signed(facts.inodes),
        signed(facts.bytes),
        facts.root_uid,
        facts.root_gid,
        layer.used.0,
        signed(layer.fetched),
        signed(layer.shared)
    ])?;
    Ok(())
}

/// The content of an active snapshot is this layer image from now on.
pub(super) fn applied(
    db: &Connection,
    key: &Key,
    choice: &LayerChoice,
) -> Result<Done<Arc<LayerRecord>>, OpError> {
    let Some(record) = tables::find(db, key)? else {
        return Err(SnapshotError::NotFound { key: key.clone() }.into());
    };
    if record.info.kind != Kind::Active || record.layer.is_some() {
        return Err(SnapshotError::NotActive { key: key.clone() }.into());
    }
    let Some(layer) = claim(db, choice, Timestamp::now())? else {
        return Err(SnapshotError::NotActive { key: key.clone() }.into());
    };
    let serials = [signed(record.id.serial), signed(layer.id.serial)];
    db.prepare_cached("UPDATE snapshot SET layer = ?2 WHERE serial = ?1")?.execute(serials)?;
    let layer = Arc::new(layer);
    let record = Record { layer: Some(layer.id.serial), ..record };
    let changes = vec![Change::Layer(Arc::clone(&layer)), Change::Put(Arc::new(record), None)];
    Ok(Done { answer: layer, changes })
}

/// Ready → Removing, for those that no snapshot and no queued publish needs.
pub(super) fn evict(db: &Connection, serials: &[u64]) -> Result<Done<()>, OpError> {
    let mut needed = db.prepare_cached(
        "SELECT 1 FROM snapshot WHERE layer = ?1 UNION ALL SELECT 1 FROM publish WHERE layer = ?1 AND dropped = 0 LIMIT 1",
    )?;
    let mut changes = Vec::new();
    for serial in serials {
        if needed.exists([signed(*serial)])? {
            continue;
        }
        let Some(layer) = find(db, *serial)? else { continue };
        db.prepare_cached("DELETE FROM publish WHERE layer = ?1")?.execute([signed(*serial)])?;
        db.prepare_cached("DELETE FROM layer WHERE serial = ?1")?.execute([signed(*serial)])?;
        db.prepare_cached("UPDATE storage SET state = ?2 WHERE serial = ?1")?
            .execute([signed(*serial), REMOVING])?;
        changes.push(Change::LayerGone(layer.id));
    }
    Ok(Done { answer: (), changes })
}

const ENTRY: &str =
    "SELECT chain, parent_chain, namespace, layer, added, attempts, dropped, message FROM publish";

/// Queues an entry unless its chain is queued.
pub(super) fn enqueue(db: &Connection, entry: &PublishEntry) -> Result<Done<()>, OpError> {
    let queued = db
        .prepare_cached("SELECT 1 FROM publish WHERE chain = ?1 AND dropped = 0")?
        .exists([entry.chain.0.as_str()])?;
    if queued {
        return Ok(Done { answer: (), changes: Vec::new() });
    }
    put_entry(db, entry)?;
    Ok(Done { answer: (), changes: vec![Change::Queued(entry.clone())] })
}

/// Writes an entry as it is now, or removes it.
pub(super) fn requeue(
    db: &Connection,
    chain: &ChainId,
    entry: Option<&PublishEntry>,
) -> Result<Done<()>, OpError> {
    let there = db.prepare_cached("SELECT 1 FROM publish WHERE chain = ?1")?.exists([chain.0.as_str()])?;
    match entry {
        // Removed with its layer meanwhile.
        Some(_) if !there => Ok(Done { answer: (), changes: Vec::new() }),
        Some(entry) => {
            put_entry(db, entry)?;
            Ok(Done { answer: (), changes: vec![Change::Queued(entry.clone())] })
        }
        None => {
            db.prepare_cached("DELETE FROM publish WHERE chain = ?1")?.execute([chain.0.as_str()])?;
            Ok(Done { answer: (), changes: vec![Change::Unqueued(chain.clone())] })
        }
    }
}

fn put_entry(db: &Connection, entry: &PublishEntry) -> Result<(), OpError> {
    db.prepare_cached(
        "INSERT OR REPLACE INTO publish (chain, parent_chain, namespace, layer, added, attempts, dropped, message)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute(params![
        entry.chain.0.as_str(),
        entry.below.as_ref().map_or("", |chain| chain.0.as_str()),
        entry.namespace,
        entry.layer.map(signed),
        entry.added.0,
        entry.attempts,
        entry.dropped.is_some(),
        entry.dropped.as_ref().unwrap_or(&entry.message),
    ])?;
    Ok(())
}

fn entry_of(row: &Row<'_>) -> rusqlite::Result<PublishEntry> {
    let below: String = row.get(1)?;
    let message: String = row.get(7)?;
    let layer: Option<i64> = row.get(3)?;
    Ok(PublishEntry {
        chain: ChainId(digest(0, &row.get::<_, String>(0)?)?),
        below: if below.is_empty() { None } else { Some(ChainId(digest(1, &below)?)) },
        namespace: row.get(2)?,
        layer: layer.map(unsigned),
        added: Timestamp(row.get(4)?),
        attempts: row.get(5)?,
        dropped: row.get::<_, bool>(6)?.then(|| message.clone()),
        message,
    })
}

fn layer_of(row: &Row<'_>) -> rusqlite::Result<LayerRecord> {
    let number = |at: usize| row.get(at).map(unsigned);
    let (size, metadata, length) = (number(10)?, number(11)?, number(12)?);
    let attributes: String = row.get(3)?;
    let blob: Option<String> = row.get(6)?;
    let index: Option<String> = row.get(7)?;
    Ok(LayerRecord {
        id: Id { serial: number(0)?, slot: row.get(1)? },
        facts: Facts {
            diff_id: DiffId(digest(2, &row.get::<_, String>(2)?)?),
            attributes: if attributes.is_empty() { None } else { Some(unhex(3, &attributes)?) },
            tar_size: number(9)?,
            layout: Layout { data: RESERVED..metadata, metadata: metadata..metadata + length, size },
            root_uid: row.get(15)?,
            root_gid: row.get(16)?,
            inodes: number(13)?,
            bytes: number(14)?,
        },
        origin: if row.get::<_, i64>(4)? == 0 { Origin::Applied } else { Origin::Fetched },
        progress: if row.get(5)? { Progress::Complete } else { Progress::Filling },
        blob: blob.map(|text| digest(6, &text)).transpose()?,
        index: index.map(|text| unhex(7, &text)).transpose()?,
        published: row.get::<_, Option<i64>>(8)?.map(Timestamp),
        used: Timestamp(row.get(17)?),
        fetched: number(18)?,
        shared: number(19)?,
    })
}

fn origin_number(origin: Origin) -> i64 {
    match origin {
        Origin::Applied => 0,
        Origin::Fetched => 1,
    }
}

fn attributes_text(facts: &Facts) -> String {
    facts.attributes.map_or_else(String::new, hex)
}

fn hex(bytes: [u8; 32]) -> String {
    blake3::Hash::from_bytes(bytes).to_hex().to_string()
}

fn unhex(column: usize, text: &str) -> rusqlite::Result<[u8; 32]> {
    match blake3::Hash::from_hex(text) {
        Ok(hash) => Ok(*hash.as_bytes()),
        Err(error) => Err(tables::damaged(column, error)),
    }
}

fn digest(column: usize, text: &str) -> rusqlite::Result<Digest> {
    Digest::parse(text).map_err(|error| tables::damaged(column, error))
}
