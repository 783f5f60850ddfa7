package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// TestCleanup removes snapshots of all kinds and looks for their directories.
func TestCleanup(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "kept", "", func(dir string) { write(t, dir+"/file", "1") })
	live, err := s.prepare("live", "kept", nil)
	must(t, err)
	write(t, upper(t, live)+"/mine", "2")

	var dirs []string
	for i := range 30 {
		key := fmt.Sprintf("gone %d", i)
		m, err := s.prepare(key, "kept", nil)
		must(t, err)
		dir := upper(t, m)
		dirs = append(dirs, filepath.Dir(dir))
		write(t, fmt.Sprintf("%s/deep/%d/file", dir, i), "x")
		// What makes a naive removal stumble.
		write(t, dir+"/locked/file", "x")
		must(t, os.Chmod(dir+"/locked", 0))
		must(t, os.Symlink("/", dir+"/root"))
		must(t, os.Symlink(upper(t, live), dir+"/neighbour"))
		must(t, unix.Mknod(dir+"/whiteout", unix.S_IFCHR, 0))
		must(t, os.WriteFile(dir+"/bad \xff name\n", nil, 0))
		if i%3 == 0 {
			must(t, s.commit(key+" committed", key, "", nil))
			key += " committed"
		}
		must(t, s.remove(key))
		_, err = s.stat(key)
		wantCode(t, "Stat of a removed snapshot", err, codes.NotFound)
		// The name is free at once, whatever the disk still holds.
		_, err = s.prepare(key, "kept", nil)
		must(t, err)
		must(t, s.remove(key))
	}
	must(t, s.cleanup())
	for _, dir := range dirs {
		if _, err := os.Lstat(dir); !os.IsNotExist(err) {
			t.Errorf("%s is still there after Cleanup: %v", dir, err)
		}
	}
	must(t, s.cleanup()) // again, with nothing to do
	wantFile(t, upper(t, live)+"/mine", "2")
	mounted(t, live, func(dir string) { wantFile(t, dir+"/file", "1") })
	s.wantNames(t, "kept", "live")
	s.wantConsistent(t)

	// A crash between Remove and Cleanup leaves nothing for ever.
	m, err := s.prepare("crash", "", nil)
	must(t, err)
	write(t, upper(t, m)+"/file", "x")
	must(t, s.remove("crash"))
	s.restart(t, killed)
	must(t, s.cleanup())
	if _, err := os.Lstat(upper(t, m)); !os.IsNotExist(err) {
		t.Errorf("left after a crash: %v", err)
	}
	s.wantConsistent(t)
}

// TestCleanupDeep: any container can nest directories deeper than a path can
// name. Usage, Commit and removal must walk them all the same.
func TestCleanupDeep(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	const depth = 5000
	m, err := s.prepare("deep", "", nil)
	must(t, err)
	top := upper(t, m)
	fd, err := unix.Open(top, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	for range depth {
		must(t, unix.Mkdirat(fd, "d", 0o755))
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		must(t, unix.Close(fd))
		fd = next
	}
	must(t, unix.Close(fd))
	_, inodes, err := s.usage("deep")
	if err != nil || inodes != depth+1 {
		t.Errorf("usage of a deep tree: %d inodes, %v", inodes, err)
	}
	must(t, s.commit("deep done", "deep", "", nil))
	if _, inodes, err = s.usage("deep done"); err != nil || inodes != depth+1 {
		t.Errorf("usage of a committed deep tree: %d inodes, %v", inodes, err)
	}
	must(t, s.remove("deep done"))
	must(t, s.cleanup())
	if _, err := os.Lstat(top); !os.IsNotExist(err) {
		t.Errorf("the deep tree is still there: %v", err)
	}
	s.wantConsistent(t)
}

// TestCleanupMountPoint: somebody has mounted something inside an upper
// directory. Removal must never delete through it.
func TestCleanupMountPoint(t *testing.T) {
	needRoot(t)
	t.Parallel()
	victim, err := os.MkdirTemp("", "sp-victim-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(victim) })
	s := serve(t)

	for _, kind := range []string{"bind", "tmpfs", "file"} {
		write(t, victim+"/precious", "keep me")
		m, err := s.prepare(kind, "", nil)
		must(t, err)
		dir := upper(t, m)
		point, precious := dir+"/a/b/point", dir+"/a/b/point/precious"
		switch kind {
		case "bind":
			must(t, os.MkdirAll(point, 0o755))
			must(t, unix.Mount(victim, point, "", unix.MS_BIND, ""))
		case "tmpfs":
			must(t, os.MkdirAll(point, 0o755))
			must(t, unix.Mount("tmpfs", point, "tmpfs", 0, "size=1m"))
			write(t, precious, "keep me")
		case "file":
			write(t, point, "below")
			must(t, unix.Mount(victim+"/precious", point, "", unix.MS_BIND, ""))
			precious = point
		}
		must(t, s.remove(kind))
		for range 2 {
			// Whether Cleanup calls it an error is its own affair; it must come
			// back and must not touch what is mounted.
			if err := s.cleanup(); err != nil {
				t.Logf("Cleanup with a mounted %s: %v", kind, err)
			}
			wantFile(t, precious, "keep me")
		}
		// Other removals are not held up by it.
		other, err := s.prepare("other "+kind, "", nil)
		must(t, err)
		write(t, upper(t, other)+"/file", "x")
		must(t, s.remove("other "+kind))
		if err := s.cleanup(); err != nil {
			t.Logf("Cleanup with a mounted %s: %v", kind, err)
		}
		if _, err := os.Lstat(upper(t, other)); !os.IsNotExist(err) {
			t.Errorf("a mount in one directory kept another: %v", err)
		}

		must(t, unix.Unmount(point, 0))
		must(t, s.cleanup())
		if _, err := os.Lstat(dir); !os.IsNotExist(err) {
			t.Errorf("after the unmount the directory is still there: %v", err)
		}
		wantFile(t, victim+"/precious", "keep me")
	}
	s.wantConsistent(t)
}

// TestCleanupMounted removes a snapshot that is in use. Its directories may go,
// as with the built-in snapshotter; the daemon and its neighbours go on.
func TestCleanupMounted(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "base", "", func(dir string) { write(t, dir+"/file", "1") })
	m, err := s.prepare("busy", "base", nil)
	must(t, err)
	mounted(t, m, func(dir string) {
		write(t, dir+"/new", "2")
		must(t, s.remove("busy"))
		must(t, s.cleanup())
		s.wantNames(t, "base")
		wantFile(t, dir+"/file", "1") // the layer below is not ours to take
	})
	must(t, s.cleanup())
	if _, err := os.Lstat(upper(t, m)); !os.IsNotExist(err) {
		t.Errorf("still there after the unmount: %v", err)
	}
	s.wantConsistent(t)
}
