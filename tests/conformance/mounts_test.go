package conformance

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// builtin is containerd's own overlay snapshotter in this process, the measure
// of what everybody expects.
func builtin(t testing.TB, opts ...overlay.Opt) snapshots.Snapshotter {
	t.Helper()
	root, err := os.MkdirTemp("", "sp-ovl-")
	must(t, err)
	sn, err := overlay.NewSnapshotter(root, append(opts, overlay.AsynchronousRemove, overlay.WithRemapIDs)...)
	must(t, err)
	t.Cleanup(func() {
		sn.Close()
		os.RemoveAll(root)
	})
	return sn
}

// twins sends each operation to the daemon and to the built-in snapshotter and
// compares the mounts, with the directories replaced by the snapshots' names.
type twins struct {
	t    testing.TB
	s    *server
	ours snapshots.Snapshotter
	ref  snapshots.Snapshotter
	dirs [2]map[string]string // directory -> name; ours, reference
}

func newTwins(t testing.TB, s *server, opts ...overlay.Opt) *twins {
	return &twins{t: t, s: s, ours: s.snapshotter(), ref: builtin(t, opts...),
		dirs: [2]map[string]string{{}, {}}}
}

var ownDir = regexp.MustCompile(`^(?:upperdir=)?(/.*)/fs$`)

// learn takes a new snapshot's own directory from its mounts.
func (w *twins) learn(side int, name string, m []mount.Mount) {
	if len(m) != 1 {
		return
	}
	for _, o := range append([]string{m[0].Source}, m[0].Options...) {
		if d := ownDir.FindStringSubmatch(o); d != nil && (m[0].Type == "bind" || strings.HasPrefix(o, "upperdir=")) {
			if _, known := w.dirs[side][d[1]]; !known {
				w.dirs[side][d[1]] = name
			}
		}
	}
}

// plain replaces directories by names.
func (w *twins) plain(side int, m []mount.Mount) []mount.Mount {
	replace := func(s string) string {
		// "/r/l/1/fs" must not match inside "/r/l/12/fs": the slash is part of it.
		for dir, name := range w.dirs[side] {
			s = strings.ReplaceAll(s, dir+"/", "<"+name+">/")
		}
		return s
	}
	out := make([]mount.Mount, len(m))
	for i, x := range m {
		out[i] = mount.Mount{Type: x.Type, Source: replace(x.Source), Target: x.Target}
		for _, o := range x.Options {
			out[i].Options = append(out[i].Options, replace(o))
		}
	}
	return out
}

func (w *twins) create(kind snapshots.Kind, key, parent string, labels map[string]string) []mount.Mount {
	w.t.Helper()
	var got [2][]mount.Mount
	for side, sn := range []snapshots.Snapshotter{w.ours, w.ref} {
		create := sn.Prepare
		if kind == snapshots.KindView {
			create = sn.View
		}
		m, err := create(context.Background(), key, parent, snapshots.WithLabels(labels))
		must(w.t, err)
		again, err := sn.Mounts(context.Background(), key)
		must(w.t, err)
		wantMounts(w.t, "Mounts of "+key, again, m)
		w.learn(side, key, m)
		got[side] = m
	}
	w.compare(key, got[0], got[1])
	return got[0]
}

func (w *twins) compare(key string, ours, ref []mount.Mount) {
	w.t.Helper()
	a, b := w.plain(0, ours), w.plain(1, ref)
	if !reflect.DeepEqual(a, b) {
		w.t.Errorf("%s:\n got %v\nwant %v", key, a, b)
	}
}

func (w *twins) commit(name, key string) {
	w.t.Helper()
	must(w.t, w.ours.Commit(context.Background(), name, key))
	must(w.t, w.ref.Commit(context.Background(), name, key))
}

var mapped = map[string]string{
	snapshots.LabelSnapshotUIDMapping: "0:100000:65536",
	snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
}

// TestMounts compares every kind of mount with the built-in snapshotter's and
// looks that the answers stay the same for as long as the snapshot lives.
func TestMounts(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	w := newTwins(t, s)

	for i, labels := range []map[string]string{nil, mapped} {
		tag := []string{"", "mapped "}[i]
		w.create(snapshots.KindActive, tag+"active 0", "", labels)
		w.create(snapshots.KindView, tag+"view 0", "", labels)
		parent := ""
		for depth := 1; depth <= 12; depth++ {
			layer := fmt.Sprintf("%slayer %d", tag, depth)
			w.create(snapshots.KindActive, layer+" key", parent, nil)
			w.commit(layer, layer+" key")
			parent = layer
			w.create(snapshots.KindActive, fmt.Sprintf("%sactive %d", tag, depth), parent, labels)
			w.create(snapshots.KindView, fmt.Sprintf("%sview %d", tag, depth), parent, labels)
		}
	}

	// Two plain words for the table, in case the measure itself changes.
	m, err := s.mounts("active 2")
	must(t, err)
	if len(m) != 1 || m[0].Type != "overlay" || m[0].Source != "overlay" || m[0].Target != "" ||
		!slices.ContainsFunc(m[0].Options, func(o string) bool { return strings.HasPrefix(o, "workdir=") }) {
		t.Errorf("an active with parents: %v", m)
	}

	before := map[string][]mount.Mount{}
	for _, key := range s.names(t, "kind==active", "kind==view") {
		if before[key], err = s.mounts(key); err != nil {
			t.Fatal(err)
		}
	}
	if len(before) != 52 {
		t.Errorf("%d actives and views, want 52", len(before))
	}
	for what, sig := range map[string]unix.Signal{"a restart": unix.SIGTERM, "a crash": killed} {
		s.restart(t, sig)
		for key, want := range before {
			got, err := s.mounts(key)
			must(t, err)
			wantMounts(t, key+" after "+what, got, want)
		}
	}

	_, err = s.mounts("layer 3")
	wantCode(t, "Mounts of a committed snapshot", err, codes.FailedPrecondition)
	_, err = s.mounts("layer 3 key")
	wantCode(t, "Mounts of the key it had before", err, codes.NotFound)
	s.wantConsistent(t)
}

// TestMountDirectories looks at the directories behind the mounts.
func TestMountDirectories(t *testing.T) {
	needRoot(t)
	t.Parallel()
	// The mask of whoever starts the daemon must not reach into the images.
	s := serve(t, withCommand("/bin/sh", "-c", `umask 077; exec "$0" "$@"`))

	m, err := s.prepare("bare", "", nil)
	must(t, err)
	wantOwner(t, upper(t, m), 0, 0, 0o755)
	must(t, os.Chown(upper(t, m), 1234, 2345))
	must(t, os.Chmod(upper(t, m), 0o711))
	must(t, s.commit("owned", "bare", "", nil))

	// The root of a child belongs to whom its parent's root belonged.
	m, err = s.prepare("child", "owned", nil)
	must(t, err)
	wantOwner(t, upper(t, m), 1234, 2345, 0o755)
	wantOwner(t, filepath.Join(filepath.Dir(upper(t, m)), "work"), 0, 0, 0o711)
	must(t, s.commit("grandparent", "child", "", nil))
	m, err = s.prepare("grandchild", "grandparent", nil)
	must(t, err)
	wantOwner(t, upper(t, m), 1234, 2345, 0o755)

	// A mapping counts more than the parent's owner, with and without parents.
	for key, parent := range map[string]string{"mapped 0": "", "mapped 1": "owned"} {
		m, err = s.prepare(key, parent, mapped)
		must(t, err)
		wantOwner(t, upper(t, m), 100000, 200000, 0o755)
	}

	// Names of snapshots are not names of files.
	for _, key := range []string{"../../escape", "/etc/escape", "a/../../../b"} {
		m, err = s.prepare(key, "", nil)
		must(t, err)
		if dir := upper(t, m); strings.Contains(dir, "escape") || !strings.HasPrefix(dir, s.root+"/") {
			t.Errorf("key %q became directory %q", key, dir)
		}
	}
}

func wantOwner(t testing.TB, path string, uid, gid uint32, mode uint32) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	if st.Uid != uid || st.Gid != gid || st.Mode&0o7777 != mode {
		t.Errorf("%s: %d:%d %o, want %d:%d %o", path, st.Uid, st.Gid, st.Mode&0o7777, uid, gid, mode)
	}
}

// TestMountReadOnly tries to write through every kind of view.
func TestMountReadOnly(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "one", "", func(dir string) { write(t, dir+"/file", "1") })
	s.layer(t, "two", "one", func(dir string) { write(t, dir+"/more", "2") })

	for _, parent := range []string{"", "one", "two"} {
		m, err := s.view("view of "+parent, parent, nil)
		must(t, err)
		if !m[len(m)-1].ReadOnly() {
			t.Errorf("view of %q: containerd does not see that %v is read-only", parent, m)
		}
		mounted(t, m, func(dir string) {
			for what, err := range map[string]error{
				"create": os.WriteFile(dir+"/new", nil, 0o644),
				"mkdir":  os.Mkdir(dir+"/dir", 0o755),
				"chmod":  os.Chmod(dir, 0o700),
			} {
				if err == nil {
					t.Errorf("view of %q: %s worked", parent, what)
				}
			}
			if parent != "" {
				if err := os.WriteFile(dir+"/file", []byte("changed"), 0o644); err == nil {
					t.Errorf("view of %q: a file was changed", parent)
				}
				wantFile(t, dir+"/file", "1")
			}
		})
		m, err = s.prepare("active on "+parent, parent, nil)
		must(t, err)
		if m[len(m)-1].ReadOnly() {
			t.Errorf("active on %q: containerd would take %v for a staged layer", parent, m)
		}
	}
}
