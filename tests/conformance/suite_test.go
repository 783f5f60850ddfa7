package conformance

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	bolt "go.etcd.io/bbolt"
)

// The suite is told "overlayfs": with that name it leaves out the one thing no
// overlay can do without redirect_dir, the renaming of a lower directory.
const suiteName = "overlayfs"

// TestDirect is containerd's own suite through its proxy client.
func TestDirect(t *testing.T) {
	needRoot(t)
	logs := collectLogs(t)
	testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := newServer(withRoot(root))
		if err != nil {
			return nil, nil, err
		}
		return s.snapshotter(), func() error {
			logs(s)
			return s.close()
		}, nil
	})
}

// TestMetadata is the same suite through containerd's metadata layer, which
// renames every key, filters labels and looks parents up by itself.
func TestMetadata(t *testing.T) {
	needRoot(t)
	logs := collectLogs(t)
	testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := newServer(withRoot(root))
		if err != nil {
			return nil, nil, err
		}
		db, err := bolt.Open(filepath.Join(s.dir, "meta.db"), 0o600, nil)
		if err != nil {
			return nil, nil, errors.Join(err, s.close())
		}
		sn := metadata.NewDB(db, nil, map[string]snapshots.Snapshotter{name: s.snapshotter()}).Snapshotter(name)
		return sn, func() error {
			logs(s)
			return errors.Join(sn.Close(), db.Close(), s.close())
		}, nil
	})
}

// collectLogs keeps the logs of the daemons of a suite, whose subtests are out
// of reach here, and shows them if any subtest failed.
func collectLogs(t *testing.T) func(*server) {
	var mu sync.Mutex
	var logs []string
	t.Cleanup(func() {
		if t.Failed() {
			for _, l := range logs {
				t.Log(l)
			}
		}
	})
	return func(s *server) {
		mu.Lock()
		defer mu.Unlock()
		logs = append(logs, s.root+"\n"+s.tail())
	}
}
