-- A metadata.db of format version 1 with a committed snapshot, an active one on it, a Pending and a Removing Id.
PRAGMA application_id = 1397769305;
PRAGMA user_version = 1;
CREATE TABLE property (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
CREATE TABLE storage (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    slot   INTEGER NOT NULL UNIQUE,
    state  INTEGER NOT NULL CHECK (state IN (0, 1, 2))
) STRICT;
CREATE TABLE snapshot (
    serial  INTEGER PRIMARY KEY REFERENCES storage (serial),
    key     TEXT NOT NULL UNIQUE,
    parent  INTEGER REFERENCES snapshot (serial),
    kind    INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    labels  TEXT NOT NULL,
    ref     TEXT CHECK (ref IS NULL OR kind = 3),
    bytes   INTEGER,
    inodes  INTEGER
) STRICT;
CREATE INDEX snapshot_parent ON snapshot (parent);
CREATE UNIQUE INDEX snapshot_ref ON snapshot (ref, ifnull(parent, 0)) WHERE ref IS NOT NULL;
INSERT INTO property VALUES ('driver', 'test');
INSERT INTO storage VALUES (3, 0, 1), (4, 1, 1), (7, 2, 0), (9, 3, 2);
INSERT INTO snapshot VALUES
    (3, 'ns/1/base', NULL, 3, 1000, 1000, '{"containerd.io/snapshot.ref":"sha256:aa"}', 'sha256:aa', 4096, 1),
    (4, 'ns/2/work', 3, 2, 2000, 3000, '{"a":"b"}', NULL, NULL, NULL);
