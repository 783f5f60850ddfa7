package conformance

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
)

// thin is what a daemon over thin volumes is told: small file systems on a
// small pool in files, so that every subtest has one of its own.
var thin = []string{"SPEEDY_DRIVER=thin", "SPEEDY_THIN_SIZE=64MiB", "SPEEDY_POOL_SIZE=1GiB"}

// TestThin is containerd's own suite over thin volumes. Nothing is left out of
// it: a volume is one file system, in which everything can be renamed.
func TestThin(t *testing.T) {
	needRoot(t)
	if os.Getenv("TEST_THIN") == "" {
		t.Skip("SKIPPED, NOT PASSED: this needs device-mapper; contrib/test runs it in a virtual machine (TEST_THIN)")
	}
	logs := collectLogs(t)
	testsuite.SnapshotterSuite(t, "devmapper", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := newServer(withRoot(root), withEnv(thin...))
		if err != nil {
			return nil, nil, err
		}
		return s.snapshotter(), func() error {
			logs(s)
			stopped := s.stop(os.Interrupt)
			return errors.Join(stopped, clearPool(s.root), s.close())
		}, nil
	})
}

// clearPool takes away the devices of the pool whose files are below root. The
// last of them may still be let go of by the kernel.
func clearPool(root string) error {
	number := ""
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range names {
		file, err := os.ReadFile(name)
		if err == nil && strings.TrimSpace(string(file)) == filepath.Join(root, "pool/data") {
			text, err := os.ReadFile(filepath.Join(filepath.Dir(name), "../dev"))
			if err != nil {
				return err
			}
			number = strings.TrimSpace(string(text))
		}
	}
	if number == "" {
		return nil
	}
	table, err := exec.Command("dmsetup", "table").Output()
	if err != nil {
		return err
	}
	prefix := ""
	for line := range strings.Lines(string(table)) {
		name, rest, _ := strings.Cut(line, ": ")
		if strings.HasSuffix(name, "-pool") && strings.Contains(rest, " "+number+" ") {
			prefix = strings.TrimSuffix(name, "pool")
		}
	}
	for range 50 {
		left := 0
		listed, err := exec.Command("dmsetup", "ls").Output()
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(listed)) {
			if name, _, _ := strings.Cut(line, "\t"); prefix != "" && strings.HasPrefix(name, prefix) {
				left++
				_ = exec.Command("dmsetup", "remove", name).Run()
				_ = os.Remove("/dev/mapper/" + name)
			}
		}
		if left == 0 {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return errors.New("devices of the pool are still in use")
}
