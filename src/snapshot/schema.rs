//! The metadata file: what it is, what is in it, and how one is told from somebody else's.
//!
//! `<root>/metadata.db` is an SQLite database in WAL mode with `synchronous=FULL`; operators may read it with `sqlite3` while
//! the daemon runs. `application_id` is [`APPLICATION_ID`], `user_version` is [`VERSION`].
//!
//! A new file is made beside its place, complete, and renamed: there is never a half-made one under the name. An existing
//! file is recognised by its header (SQLite file format, section 1.3: magic at 0, `user_version` at 60, `application_id` at
//! 68, big-endian) before SQLite opens it, so that a foreign file is not touched, not even by a recovery.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension};

use super::metastore::MetaError;

/// `SPDY`.
pub(super) const APPLICATION_ID: i32 = 0x5350_4459;
/// The version this program writes. A newer one is refused; an older one is brought up to it when it is opened for writing.
pub(super) const VERSION: i32 = 2;
/// The oldest version that can be.
const OLDEST: i32 = 1;

const TABLES: &str = "
CREATE TABLE property (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

-- One row for each Id that exists in any sense. AUTOINCREMENT: a serial is never given twice (M3).
CREATE TABLE storage (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    slot   INTEGER NOT NULL UNIQUE,
    state  INTEGER NOT NULL CHECK (state IN (0, 1, 2))  -- 0 pending, 1 ready, 2 removing
) STRICT;

-- One row for each snapshot. Keys and names share one column, so they share one space (M1). The reference to the parent
-- keeps it from being deleted (M2).
CREATE TABLE snapshot (
    serial  INTEGER PRIMARY KEY REFERENCES storage (serial),
    key     TEXT NOT NULL UNIQUE,
    parent  INTEGER REFERENCES snapshot (serial),
    kind    INTEGER NOT NULL CHECK (kind IN (1, 2, 3)), -- 1 view, 2 active, 3 committed, as in containerd's API
    created INTEGER NOT NULL,                           -- nanoseconds since 1970 UTC
    updated INTEGER NOT NULL,
    labels  TEXT NOT NULL,                              -- a JSON object of strings
    ref     TEXT CHECK (ref IS NULL OR kind = 3),       -- chain ID, on the one snapshot that answers for (ref, parent)
    bytes   INTEGER,                                    -- usage, once measured
    inodes  INTEGER
) STRICT;
CREATE INDEX snapshot_parent ON snapshot (parent);
CREATE UNIQUE INDEX snapshot_ref ON snapshot (ref, ifnull(parent, 0)) WHERE ref IS NOT NULL; -- (M5)
";

/// What version 2 adds: layer images and what is to be published.
const TABLES_2: &str = "
-- One row for each layer image on this node. It has an Id of its own, Ready while the row is there; its file is
-- layer/<serial>.erofs below the root, or layer/<serial>.part until it is complete.
CREATE TABLE layer (
    serial          INTEGER PRIMARY KEY REFERENCES storage (serial),
    diff_id         TEXT NOT NULL,
    attributes      TEXT NOT NULL,     -- hash of what implied directories took from below, hexadecimal; '' for none
    origin          INTEGER NOT NULL CHECK (origin IN (0, 1)), -- 0 made here from a blob, 1 fetched from the store
    complete        INTEGER NOT NULL CHECK (complete IN (0, 1)),
    blob            TEXT,              -- digest of the compressed blob it was made from
    store_index     TEXT,              -- BLAKE3 of its layer index, hexadecimal, once it is known
    published       INTEGER,           -- when it was last seen durable in the store
    tar_size        INTEGER NOT NULL,
    image_size      INTEGER NOT NULL,
    metadata_offset INTEGER NOT NULL,
    metadata_length INTEGER NOT NULL,
    inodes          INTEGER NOT NULL,
    data_bytes      INTEGER NOT NULL,
    root_uid        INTEGER NOT NULL,
    root_gid        INTEGER NOT NULL,
    fetched         INTEGER NOT NULL DEFAULT 0, -- bytes that came from the store
    shared          INTEGER NOT NULL DEFAULT 0, -- bytes that other layer images of this node had
    used            INTEGER NOT NULL   -- when a snapshot last began to use it
) STRICT;
CREATE UNIQUE INDEX layer_identity ON layer (diff_id, attributes, origin);

-- What a snapshot consists of: its own directory, a layer image, or both (the directory above the image).
ALTER TABLE snapshot ADD COLUMN layer INTEGER REFERENCES layer (serial);
ALTER TABLE snapshot ADD COLUMN own INTEGER NOT NULL DEFAULT 1 CHECK (own IN (0, 1));
CREATE INDEX snapshot_layer ON snapshot (layer) WHERE layer IS NOT NULL;

-- Layers that are to be published, one row for each chain ID.
CREATE TABLE publish (
    chain        TEXT PRIMARY KEY,
    parent_chain TEXT NOT NULL,        -- '' for the first layer of an image
    namespace    TEXT NOT NULL,        -- containerd's, where the blob is
    layer        INTEGER REFERENCES layer (serial), -- NULL where files were unpacked: the blob has to be found
    added        INTEGER NOT NULL,
    attempts     INTEGER NOT NULL DEFAULT 0,
    dropped      INTEGER NOT NULL DEFAULT 0 CHECK (dropped IN (0, 1)), -- 1: given up, message says why
    message      TEXT NOT NULL DEFAULT ''
) STRICT;
";

/// Opens the file for writing, making it where there is none.
pub(super) fn open(path: &Path, driver: &str) -> Result<Connection, MetaError> {
    if recognise(path)?.is_none() {
        create(path, driver)?;
    }
    let mut db = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    db.busy_timeout(Duration::from_secs(5))?;
    check_driver(&db, path, driver)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "FULL")?;
    migrate(&mut db)?;
    db.pragma_update(None, "foreign_keys", true)?;
    // The first write makes the log and its index: now, while the reserve is given up, not in the first call on a full disk.
    db.execute("UPDATE property SET value = value WHERE name = 'driver'", [])?;
    if let Err(error) = presize_log(&db, path) {
        tracing::warn!(%error, "no room is set aside in the metadata log: removals may fail when the disk is full");
    }
    db.set_prepared_statement_cache_capacity(64);
    Ok(db)
}

/// Opens the file for reading beside a running daemon; `None` where there is none.
pub(super) fn open_read_only(path: &Path) -> Result<Option<Connection>, MetaError> {
    if recognise(path)?.is_none() {
        return Ok(None);
    }
    let db = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    db.busy_timeout(Duration::from_secs(5))?;
    Ok(Some(db))
}

/// The version of the file at `path` if it is ours and one we know; `None` where there is no file.
pub(super) fn recognise(path: &Path) -> Result<Option<i32>, MetaError> {
    let io = |source| MetaError::Io { path: path.to_owned(), source };
    let mut header = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(100).read_to_end(&mut header).map_err(io)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let number = |at: usize| header.get(at..at + 4).and_then(|b| b.try_into().ok()).map(i32::from_be_bytes);
    if !header.starts_with(b"SQLite format 3\0") || number(68) != Some(APPLICATION_ID) {
        return Err(MetaError::Foreign { path: path.to_owned() });
    }
    match number(60) {
        Some(version @ OLDEST..=VERSION) => Ok(Some(version)),
        found => Err(MetaError::Version { path: path.to_owned(), found: found.unwrap_or(0), known: VERSION }),
    }
}

/// The version that an open file has.
pub(super) fn version(db: &Connection) -> Result<i32, rusqlite::Error> {
    db.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// Brings an older file up to [`VERSION`], in one transaction.
fn migrate(db: &mut Connection) -> Result<(), rusqlite::Error> {
    if version(db)? == VERSION {
        return Ok(());
    }
    let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    tx.execute_batch(TABLES_2)?;
    tx.pragma_update(None, "user_version", VERSION)?;
    tx.commit()?;
    tracing::info!(from = OLDEST, to = VERSION, "the metadata file was brought up to this version");
    Ok(())
}

fn create(path: &Path, driver: &str) -> Result<(), MetaError> {
    let io = |source| MetaError::Io { path: path.to_owned(), source };
    let unfinished = PathBuf::from(format!("{}.new", path.display()));
    for leftover in [unfinished.clone(), PathBuf::from(format!("{}-journal", unfinished.display()))] {
        match std::fs::remove_file(leftover) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
    }
    let mut db = Connection::open(&unfinished)?;
    let tx = db.transaction()?;
    tx.pragma_update(None, "application_id", APPLICATION_ID)?;
    tx.pragma_update(None, "user_version", VERSION)?;
    tx.execute_batch(TABLES)?;
    tx.execute_batch(TABLES_2)?;
    tx.execute("INSERT INTO property (name, value) VALUES ('driver', ?1)", [driver])?;
    tx.commit()?;
    db.close().map_err(|(_, error)| error)?;
    File::open(&unfinished).and_then(|f| f.sync_all()).map_err(io)?;
    std::fs::rename(&unfinished, path).map_err(io)?;
    match path.parent() {
        Some(dir) => File::open(dir).and_then(|d| d.sync_all()).map_err(io),
        None => Ok(()),
    }
}

/// Makes the write-ahead log as long as it will ever be, so that writing to it overwrites blocks it has: a Remove needs no
/// room on a full disk then, however much others write, and no fsync has to record a new length. A checkpoint keeps the length
/// (there is no `journal_size_limit`); the pages that were written for this are free pages of the database afterwards, room
/// for its own growth.
fn presize_log(db: &Connection, path: &Path) -> Result<(), rusqlite::Error> {
    const BYTES: u64 = 5 << 20;
    let log = PathBuf::from(format!("{}-wal", path.display()));
    if std::fs::metadata(log).is_ok_and(|log| log.len() >= BYTES) {
        return Ok(());
    }
    db.pragma_update(None, "wal_autocheckpoint", 0)?;
    let grown = db
        .execute_batch("BEGIN; CREATE TABLE presize (room BLOB)")
        .and_then(|()| db.execute("INSERT INTO presize VALUES (zeroblob(?1))", [BYTES.cast_signed()]))
        .and_then(|_| db.execute_batch("COMMIT; DROP TABLE presize"));
    if grown.is_err() && !db.is_autocommit() {
        db.execute_batch("ROLLBACK")?;
    }
    db.pragma_update(None, "wal_autocheckpoint", 1000)?;
    grown?;
    db.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))
}

fn check_driver(db: &Connection, path: &Path, driver: &str) -> Result<(), MetaError> {
    let found: Option<String> =
        db.query_row("SELECT value FROM property WHERE name = 'driver'", [], |row| row.get(0)).optional()?;
    match found {
        Some(found) if found == driver => Ok(()),
        found => Err(MetaError::OtherDriver {
            path: path.to_owned(),
            found: found.unwrap_or_else(|| "none".into()),
            wanted: driver.to_owned(),
        }),
    }
}
