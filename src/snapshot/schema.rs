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
/// The one version there is. A newer one is refused; an older one will be migrated here.
pub(super) const VERSION: i32 = 1;

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

/// Opens the file for writing, making it where there is none.
pub(super) fn open(path: &Path, driver: &str) -> Result<Connection, MetaError> {
    if recognise(path)?.is_none() {
        create(path, driver)?;
    }
    let db = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    db.busy_timeout(Duration::from_secs(5))?;
    check_driver(&db, path, driver)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "FULL")?;
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
        Some(VERSION) => Ok(Some(VERSION)),
        found => Err(MetaError::Version { path: path.to_owned(), found: found.unwrap_or(0), known: VERSION }),
    }
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
