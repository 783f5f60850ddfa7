package conformance

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"
)

// look lists all that can be seen of a committed snapshot, one line a file.
func look(t testing.TB, ctx context.Context, sn snapshots.Snapshotter, parent string) []string {
	t.Helper()
	key := "look at " + parent
	m, err := sn.View(ctx, key, parent)
	must(t, err)
	var lines []string
	mounted(t, m, func(dir string) {
		inodes := map[uint64]string{}
		must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return err
			}
			rel, err := filepath.Rel(dir, path)
			if err != nil {
				return err
			}
			line := fmt.Sprintf("%q %o %d:%d", rel, st.Mode, st.Uid, st.Gid)
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFREG:
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				line += fmt.Sprintf(" %d bytes %.8x at %d", len(data), sha256.Sum256(data), st.Mtim.Sec)
				if first, ok := inodes[st.Ino]; ok && st.Nlink > 1 {
					line += fmt.Sprintf(" same as %q", first)
				}
				inodes[st.Ino] = rel
			case unix.S_IFLNK:
				target, err := os.Readlink(path)
				if err != nil {
					return err
				}
				line += fmt.Sprintf(" to %q", target)
			case unix.S_IFCHR, unix.S_IFBLK:
				line += fmt.Sprintf(" device %x", st.Rdev)
			}
			for _, attr := range attributes(t, path) {
				line += " " + attr
			}
			lines = append(lines, line)
			return nil
		}))
	})
	must(t, sn.Remove(ctx, key))
	return lines
}

// attributes are the extended ones, except those that overlayfs keeps for itself.
func attributes(t testing.TB, path string) []string {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	must(t, err)
	var out []string
	for _, attr := range strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if attr == "" || strings.HasPrefix(attr, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, attr, value)
		must(t, err)
		out = append(out, fmt.Sprintf("%s=%x", attr, value[:n]))
	}
	slices.Sort(out)
	return out
}

// wantLines compares two listings and shows only what differs.
func wantLines(t testing.TB, what string, got, want []string) {
	t.Helper()
	for _, l := range got {
		if !slices.Contains(want, l) {
			t.Errorf("%s: unexpected %s", what, l)
		}
	}
	for _, l := range want {
		if !slices.Contains(got, l) {
			t.Errorf("%s: missing %s", what, l)
		}
	}
}
