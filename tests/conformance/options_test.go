package conformance

import (
	"context"
	"fmt"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
)

// withConfig starts the daemon on a configuration file.
func withConfig(t testing.TB, text string) option {
	t.Helper()
	return func(s *server) {
		file := s.dir + "/speedy.toml"
		write(t, file, text)
		s.args = append(s.args, "--config", file)
	}
}

// TestMountOptions configures extra options, as operators do with the built-in snapshotter.
func TestMountOptions(t *testing.T) {
	needRoot(t)
	t.Parallel()
	for _, options := range [][]string{
		{"volatile"},
		{"metacopy=on", "volatile"},
		{"index=on"}, // then no index=off may follow, the last one wins
	} {
		quoted := make([]string, len(options))
		for i, o := range options {
			quoted[i] = fmt.Sprintf("%q", o)
		}
		s := serve(t, withConfig(t, "[overlayfs]\nmount_options = ["+strings.Join(quoted, ", ")+"]\n"))
		w := newTwins(t, s, overlay.WithMountOptions(options))
		w.create(snapshots.KindActive, "one key", "", nil)
		w.commit("one", "one key")
		w.create(snapshots.KindActive, "two key", "one", nil)
		w.commit("two", "two key")
		w.create(snapshots.KindView, "view 0", "", nil)
		w.create(snapshots.KindView, "view 1", "one", nil)
		w.create(snapshots.KindView, "view 2", "two", nil)
		w.create(snapshots.KindActive, "mapped", "two", mapped)
		m := w.create(snapshots.KindActive, "active", "two", nil)
		mounted(t, m, func(dir string) { write(t, dir+"/file", "works") })
	}
}

// TestUpperdirLabel shows where a snapshot's changes are, for tools that ask.
func TestUpperdirLabel(t *testing.T) {
	needRoot(t)
	t.Parallel()
	const label = "containerd.io/snapshot/overlay.upperdir"
	s := serve(t, withConfig(t, "[overlayfs]\nupperdir_label = true\n"))
	w := newTwins(t, s, overlay.WithUpperdirLabel)
	ctx := context.Background()

	w.create(snapshots.KindActive, "base key", "", nil)
	w.commit("base", "base key")
	w.create(snapshots.KindActive, "active", "base", map[string]string{"a": "1"})
	w.create(snapshots.KindView, "bare view", "", nil)
	dirs := map[string]string{}
	for _, key := range []string{"base", "active", "bare view"} {
		theirs, err := w.ref.Stat(ctx, key)
		must(t, err)
		ours, err := w.ours.Stat(ctx, key)
		must(t, err)
		dirs[key] = ours.Labels[label]
		// "base" was learned by the key it had.
		for side, l := range []string{ours.Labels[label], theirs.Labels[label]} {
			dir, ok := strings.CutSuffix(l, "/fs")
			if known := w.dirs[side][dir]; !ok || known != key && known != key+" key" {
				t.Errorf("%s, side %d: %q is no directory of it", key, side, l)
			}
		}
		if len(ours.Labels) != len(theirs.Labels) {
			t.Errorf("%s: labels %v, the built-in snapshotter has %v", key, ours.Labels, theirs.Labels)
		}
		info, err := s.update(&snapshotsapi.Info{Name: key, Labels: map[string]string{"b": "2"}})
		must(t, err)
		if info.GetLabels()[label] != dirs[key] || info.GetLabels()["b"] != "2" || len(info.GetLabels()) != 2 {
			t.Errorf("%s: Update answers %v", key, info.GetLabels())
		}
		// What a client sends under this name is not what it gets back.
		if info, err = s.update(&snapshotsapi.Info{Name: key, Labels: map[string]string{label: "/etc"}}); err != nil || info.GetLabels()[label] != dirs[key] {
			t.Errorf("%s: a client changed the label: %v %v", key, info, err)
		}
	}
	infos, err := s.list()
	must(t, err)
	for _, i := range infos {
		if i.GetLabels()[label] != dirs[i.GetName()] {
			t.Errorf("List shows %v", i)
		}
	}
}
