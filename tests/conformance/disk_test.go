package conformance

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// pool is how many empty directories the daemon may keep ready for snapshots to come.
const pool = 64

// wantConsistent collects what was removed and looks whether store and disk
// agree: by counting, and by what `speedy check` says.
func (s *server) wantConsistent(t testing.TB) {
	t.Helper()
	must(t, s.cleanup())
	live := len(s.names(t))
	dirs, err := os.ReadDir(filepath.Join(s.root, "l"))
	must(t, err)
	if len(dirs) < live || len(dirs) > live+pool {
		t.Errorf("%d directories for %d snapshots", len(dirs), live)
	}
	full := 0
	for _, d := range dirs {
		if files, err := os.ReadDir(filepath.Join(s.root, "l", d.Name(), "fs")); err == nil && len(files) > 0 {
			full++
		}
	}
	if full > live {
		t.Errorf("%d directories hold files, there are %d snapshots", full, live)
	}

	// The exit code speaks of the whole machine (no containerd here), so only
	// the store's part of the report counts.
	out, runErr := s.run("check", "--json", "--root", s.root, "--address", s.socket)
	var report struct {
		Store *struct {
			Consistent bool `json:"consistent"`
		} `json:"store"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil || report.Store == nil {
		t.Errorf("check --json says nothing of the store: %v %v %.2000s", err, runErr, out)
	} else if !report.Store.Consistent {
		t.Errorf("store and disk differ: %.4000s", out)
	}
}
