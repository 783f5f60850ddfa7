package conformance

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// metadataLayer is the part of containerd that stands between its clients and a
// snapshotter: namespaces, leases and the garbage collector.
type metadataLayer struct {
	db *metadata.DB
	sn snapshots.Snapshotter
	cs content.Store
}

func newMetadataLayer(t testing.TB, backend snapshots.Snapshotter) *metadataLayer {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp-meta-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	file, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	must(t, err)
	store, err := local.NewStore(filepath.Join(dir, "content"))
	must(t, err)
	db := metadata.NewDB(file, store, map[string]snapshots.Snapshotter{name: backend})
	must(t, db.Init(context.Background()))
	t.Cleanup(func() { _ = db.Close() })
	return &metadataLayer{db: db, sn: db.Snapshotter(name), cs: db.ContentStore()}
}

// collect runs containerd's garbage collector.
func (m *metadataLayer) collect(t testing.TB) {
	t.Helper()
	if _, err := m.db.GarbageCollect(context.Background()); err != nil {
		t.Errorf("garbage collection: %v", err)
	}
}

func ns(name string) context.Context {
	return namespaces.WithNamespace(context.Background(), name)
}

// refer is the label that asks for a layer by its chain id.
func refer(id string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: id})
}

// wantExists checks for the answer "is there already".
func wantExists(t testing.TB, what string, err error) {
	t.Helper()
	if !errdefs.IsAlreadyExists(err) {
		t.Errorf("%s: want already exists, got %v", what, err)
	}
}

// id makes a chain id out of one letter of a to f.
func id(c string) string {
	return "sha256:" + strings.Repeat(c, 64)
}

// layers writes a file for --store memory: chain id -> path -> content.
func layers(t testing.TB, content map[string]map[string]string) option {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp-store-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	data, err := json.Marshal(content)
	must(t, err)
	file := filepath.Join(dir, "layers.json")
	must(t, os.WriteFile(file, data, 0o600))
	return withArgs("--store", "memory:"+file)
}
