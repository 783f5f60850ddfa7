package conformance

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// tmpfs mounts a small file system for a root that is to be filled.
func tmpfs(t testing.TB, options string) string {
	t.Helper()
	disk, err := os.MkdirTemp("", "sp-disk-")
	must(t, err)
	t.Cleanup(func() { os.Remove(disk) })
	must(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "mode=0755,"+options))
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	return disk
}

// fill takes all space that is left, and gives it back when it is closed.
func fill(t testing.TB, disk, name string) *os.File {
	t.Helper()
	f, err := os.Create(disk + "/" + name)
	must(t, err)
	must(t, os.Remove(f.Name()))
	t.Cleanup(func() { f.Close() })
	for chunk := 1 << 20; chunk > 0; {
		if _, err := f.Write(make([]byte, chunk)); err != nil {
			chunk /= 2
		}
	}
	return f
}

// TestFullDisk fills the file system below the root: calls are refused by the
// right name, and nothing is half made.
func TestFullDisk(t *testing.T) {
	needRoot(t)
	t.Parallel()
	for what, options := range map[string]string{"bytes": "size=24m", "inodes": "size=64m,nr_inodes=400"} {
		t.Run(what, func(t *testing.T) {
			disk := tmpfs(t, options)
			s := serve(t, withRoot(disk+"/root"))
			s.layer(t, "base", "", func(dir string) { write(t, dir+"/file", "1") })
			want := []string{"base"}
			var room func()
			if what == "bytes" {
				f := fill(t, disk, "fill")
				room = func() { must(t, f.Close()) }
			} else {
				must(t, os.Mkdir(disk+"/fill", 0o700))
				for i := 0; ; i++ {
					if err := os.WriteFile(fmt.Sprintf("%s/fill/%d", disk, i), nil, 0o600); err != nil {
						break
					}
				}
				room = func() { must(t, os.RemoveAll(disk+"/fill")) }
			}

			full := false
			label := map[string]string{"l": strings.Repeat("x", 4000)}
			for i := 0; i < 5000 && !full; i++ {
				key := fmt.Sprintf("active %d", i)
				_, err := s.prepare(key, "base", label)
				if err == nil {
					want = append(want, key) // room was left in what is allocated already
					continue
				}
				full = true
				wantCode(t, "Prepare on a full disk", err, codes.ResourceExhausted)
				_, err = s.stat(key)
				wantCode(t, "Stat after it", err, codes.NotFound)
			}
			if !full {
				t.Fatal("the disk never got full")
			}
			s.wantNames(t, want...)

			room()
			_, err := s.prepare("room again", "base", label)
			must(t, err)
			want = append(want, "room again")
			s.restart(t, killed)
			s.wantNames(t, want...)
			m, err := s.view("look", "base", nil)
			must(t, err)
			mounted(t, m, func(dir string) { wantFile(t, dir+"/file", "1") })
			s.wantConsistent(t)
		})
	}
}

// TestFullDiskFrees: removing snapshots is how a full disk gets room again.
// containerd's collector gives up a whole pass when one Remove answers with
// anything but success or FailedPrecondition, so if Remove itself needed room,
// nothing would ever be freed. The built-in snapshotter passes this.
func TestFullDiskFrees(t *testing.T) {
	needRoot(t)
	t.Parallel()
	disk := tmpfs(t, "size=32m")
	s := serve(t, withRoot(disk+"/root"))
	s.layer(t, "base", "", nil)
	for i := range 10 {
		m, err := s.prepare(fmt.Sprintf("old %d", i), "base", nil)
		must(t, err)
		write(t, upper(t, m)+"/big", strings.Repeat("x", 1<<20))
	}
	fill(t, disk, "fill")
	label := map[string]string{"l": strings.Repeat("x", 4000)}
	var err error
	for i := 0; i < 5000 && err == nil; i++ {
		_, err = s.prepare(fmt.Sprintf("active %d", i), "base", label)
	}
	wantCode(t, "Prepare on a full disk", err, codes.ResourceExhausted)

	wantCode(t, "Remove on a full disk", s.remove("old 0"), codes.OK)
	wantCode(t, "Cleanup on a full disk", s.cleanup(), codes.OK)
	_, err = s.prepare("after", "base", label)
	wantCode(t, "Prepare with the room of a removed snapshot", err, codes.OK)

	// Whoever restarts the daemon to get out of it must not end up with none.
	fill(t, disk, "again")
	if err := s.stop(killed); err != nil {
		t.Fatal(err)
	}
	if err := s.start(); err != nil {
		t.Fatalf("start on a full disk: %v", err)
	}
	wantCode(t, "Remove after a start on a full disk", s.remove("old 1"), codes.OK)
	wantCode(t, "Cleanup after a start on a full disk", s.cleanup(), codes.OK)
}
