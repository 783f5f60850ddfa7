package conformance

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// TestUsage fills the same trees through the daemon and the built-in
// snapshotter and compares the figures, before and after the commit.
func TestUsage(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	ours, ref := s.snapshotter(), builtin(t)

	trees := []struct {
		name string
		fill func(t testing.TB, dir string)
	}{
		{"empty", nil},
		{"files", func(t testing.TB, dir string) {
			for i := range 50 {
				write(t, fmt.Sprintf("%s/d%d/f%d", dir, i%7, i), strings.Repeat("x", i*1000))
			}
			must(t, os.Symlink("short", dir+"/link"))
			must(t, os.Symlink(strings.Repeat("long/", 300), dir+"/long link"))
			must(t, unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
			must(t, unix.Mkfifo(dir+"/fifo", 0o600))
		}},
		{"hard links", func(t testing.TB, dir string) {
			write(t, dir+"/a", strings.Repeat("x", 100000))
			must(t, os.Mkdir(dir+"/sub", 0o755))
			for i := range 20 {
				must(t, os.Link(dir+"/a", fmt.Sprintf("%s/sub/a%d", dir, i)))
			}
		}},
		{"sparse", func(t testing.TB, dir string) {
			f, err := os.Create(dir + "/sparse")
			must(t, err)
			defer f.Close()
			_, err = f.WriteAt([]byte("end"), 64<<20)
			must(t, err)
			must(t, os.Truncate(dir+"/sparse", 1<<30))
		}},
		{"on top", func(t testing.TB, dir string) { // of "files"
			must(t, os.RemoveAll(dir+"/d1"))
			must(t, os.RemoveAll(dir+"/d2"))
			must(t, os.Mkdir(dir+"/d2", 0o700))
			must(t, os.Chmod(dir+"/d3/f3", 0o600))
			must(t, os.Link(dir+"/d4/f4", dir+"/linked"))
			must(t, os.Remove(dir+"/link"))
			write(t, dir+"/"+strings.Repeat("n", 255), "long name")
		}},
	}

	type figures struct{ size, inodes int64 }
	stable := map[string]figures{}
	same := func(key string) {
		t.Helper()
		want, err := ref.Usage(context.Background(), key)
		must(t, err)
		got, err := ours.Usage(context.Background(), key)
		must(t, err)
		if got != want {
			t.Errorf("%s: usage %+v, the built-in snapshotter says %+v", key, got, want)
		}
		stable[key] = figures{got.Size, got.Inodes}
	}
	for _, tree := range trees {
		parent := ""
		if tree.name == "on top" {
			parent = "files"
		}
		key := tree.name + " active"
		for _, sn := range []snapshots.Snapshotter{ours, ref} {
			m, err := sn.Prepare(context.Background(), key, parent)
			must(t, err)
			if tree.fill != nil {
				mounted(t, m, func(dir string) { tree.fill(t, dir) })
				settleBlocks(t, m)
			}
		}
		same(key)
		delete(stable, key)
		for _, sn := range []snapshots.Snapshotter{ours, ref} {
			must(t, sn.Commit(context.Background(), tree.name, key))
		}
		same(tree.name)
	}
	for _, key := range []string{"view of nothing", "view"} {
		parent := ""
		if key == "view" {
			parent = "on top"
		}
		for _, sn := range []snapshots.Snapshotter{ours, ref} {
			_, err := sn.View(context.Background(), key, parent)
			must(t, err)
		}
		same(key)
	}

	// An active one that is still being written to: at any time the truth.
	m, err := s.prepare("growing", "files", nil)
	must(t, err)
	last := int64(-1)
	mounted(t, m, func(dir string) {
		for i := range 5 {
			write(t, fmt.Sprintf("%s/new-%d", dir, i), strings.Repeat("x", 100000))
			settleBlocks(t, m)
			size, inodes, err := s.usage("growing")
			must(t, err)
			if size < last+100000 || inodes != int64(i)+2 {
				t.Errorf("after %d files: %d bytes, %d inodes", i+1, size, inodes)
			}
			last = size
		}
	})

	for what, sig := range map[string]unix.Signal{"a restart": unix.SIGTERM, "a crash": killed} {
		s.restart(t, sig)
		for key, want := range stable {
			size, inodes, err := s.usage(key)
			must(t, err)
			if got := (figures{size, inodes}); got != want {
				t.Errorf("%s after %s: %+v, was %+v", key, what, got, want)
			}
		}
	}
	_, _, err = s.usage("files active")
	wantCode(t, "Usage of a key that was committed", err, codes.NotFound)
}

// settleBlocks makes the file system decide how many blocks the files have.
func settleBlocks(t testing.TB, m []mount.Mount) {
	t.Helper()
	dir, err := os.Open(upper(t, m))
	must(t, err)
	defer dir.Close()
	must(t, unix.Syncfs(int(dir.Fd())))
}
