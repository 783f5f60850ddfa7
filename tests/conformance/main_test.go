// Package conformance runs the real daemon behind its socket and asks of it
// what containerd asks of a snapshotter.
package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// binary is the absolute path of the daemon under test.
var binary string

const name = "speedy"

func TestMain(m *testing.M) {
	path := os.Getenv("SPEEDY_BIN")
	if path == "" {
		path = "../../target/release/speedy"
	}
	abs, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(abs)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "conformance: no daemon to test (set SPEEDY_BIN or build it): %v\n", err)
		os.Exit(2)
	}
	binary = abs
	// A predictable mask; the one test that needs another starts the daemon under it.
	unix.Umask(0o022)
	// containerd's packages in this process report every bad regexp of a test.
	_ = log.SetLevel("fatal")
	os.Exit(m.Run())
}

// needRoot skips a test that mounts when it cannot.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT PASSED: this test mounts file systems and needs root")
	}
}
